"""Every way to compute a step gives the plain one's loss and gradients."""

import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from custom_components.datasets.batching import BatchPlan, collate
from custom_components.models import attention, nf4, nf4_product
from custom_components.models.attention import RowLengths, attend_row_by_row, attend_within_rows
from custom_components.models.blockwise_attention import attend_blockwise
from custom_components.models.layer_in_pieces import KEPT_IN_PLACE
from custom_components.training.compiling import compiled_layers
from custom_components.training.gradients import ForwardOptions, accumulate_gradients, supervised_loss
from custom_components.training.loss import LinearCrossEntropy
from tests.support.models import CPU, loaded_model, with_random_adapters
from tests.support.rows import random_rows

TOLERANCE = {torch.float32: {"atol": 1e-5, "rtol": 1e-5}, torch.bfloat16: {"atol": 2e-2, "rtol": 5e-2}}
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def step(model, rows, *, pack_capacity=None, chunk_size=512, num_recomputed_layers=0, layer_inputs=KEPT_IN_PLACE):
    """Loss and gradients of one optimizer step of all rows."""
    model.zero_grad(set_to_none=True)
    plan = BatchPlan(2, len(rows), shuffle=False, seed=0, pack_capacity_tokens=pack_capacity)
    [forwards] = plan.steps([len(row["tokens"]) for row in rows], epoch=0)
    batches = [collate([rows[index] for index in forward]) for forward in forwards]
    options = ForwardOptions(num_recomputed_layers, layer_inputs=layer_inputs)
    loss = accumulate_gradients(
        batches, supervised_loss(model, LinearCrossEntropy(chunk_size), options), NO_SCALER, CPU
    )
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_packed_chunked_recomputed_compiled_and_fallback_steps_equal_the_plain_one(make_checkpoint, monkeypatch, dtype):
    model = with_random_adapters(loaded_model(make_checkpoint(), dtype, quantize_base=True))
    rows = random_rows(5)
    expected = step(model, rows)

    def assert_equal(result, **tolerance):
        torch.testing.assert_close(result, expected, **(tolerance or TOLERANCE[dtype]))

    assert_equal(step(model, rows, pack_capacity=60))
    assert_equal(step(model, rows, chunk_size=3))
    assert_equal(step(model, rows, num_recomputed_layers=1))
    for max_kept_tokens in (100, 0):
        in_blocks = partial(attend_blockwise, num_block_tokens=7, max_kept_tokens=max_kept_tokens)
        monkeypatch.setattr(attention, "attend_blockwise", in_blocks)
        assert_equal(step(model, rows))
    monkeypatch.setattr(attention, "attend_within_rows", attend_row_by_row)
    assert_equal(step(model, rows))
    # The table holds the codes to four places, as torchao does, bitsandbytes to eight.
    monkeypatch.setattr(nf4, "bitsandbytes_dequantizes", lambda device_type: False)
    monkeypatch.setattr(nf4_product, "bitsandbytes_dequantizes", lambda device_type: False)
    assert_equal(step(model, rows), atol=2e-2 if dtype is torch.bfloat16 else 1e-3, rtol=5e-2)


@pytest.mark.parametrize("quantize_base", [True, False])
def test_recomputing_leaves_out_the_product_that_ends_a_layer(make_checkpoint, monkeypatch, quantize_base):
    """The backward needs nothing of a layer's last projection but its input."""
    model = loaded_model(make_checkpoint(), torch.bfloat16, quantize_base=quantize_base)
    products = []
    product = nf4_product._product
    monkeypatch.setattr(
        nf4_product, "_product", lambda *args, **kwargs: products.append(args) or product(*args, **kwargs)
    )

    def num_products(num_recomputed_layers):
        products.clear()
        step(model, random_rows(2), num_recomputed_layers=num_recomputed_layers)
        return len(products)

    num_linears_of_layer = 7
    assert num_products(1) - num_products(0) == num_linears_of_layer - 1


@pytest.mark.slow
def test_a_compiled_step_equals_the_plain_one(make_checkpoint):
    model = with_random_adapters(loaded_model(make_checkpoint(), quantize_base=True))
    expected = [step(model, random_rows(5, seed)) for seed in range(3)]
    kept_shapes = set()
    with compiled_layers(model, True, CPU, num_forwards=4):
        for seed in range(3):
            recomputed = step(model, random_rows(5, seed), num_recomputed_layers=2)
            torch.testing.assert_close(recomputed, expected[seed], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(step(model, random_rows(5, seed)), expected[seed], atol=1e-4, rtol=1e-4)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept_shapes.add(tuple(t.shape)) or t, lambda t: t):
            step(model, random_rows(5, 3))
    # A dequantized weight among them would be 16 bits a weight for all layers.
    weight_shapes = {tuple(module.weight.shape) for module in model.layers.modules() if hasattr(module, "lora_a")}
    assert not kept_shapes & (weight_shapes | {shape[::-1] for shape in weight_shapes})


def test_rows_attend_as_with_the_dense_mask():
    lengths, heads, kv_heads = (3, 1, 6), 4, 2
    query_1NSH = torch.randn(1, heads, 10, 8)
    key_1KSH, value_1KSH = torch.randn(2, 1, kv_heads, 10, 8)
    blocks_SS = torch.block_diag(*(torch.ones(length, length).tril() for length in lengths)).bool()
    expected = F.scaled_dot_product_attention(query_1NSH, key_1KSH, value_1KSH, attn_mask=blocks_SS, enable_gqa=True)
    torch.testing.assert_close(attend_within_rows(query_1NSH, key_1KSH, value_1KSH, RowLengths(lengths)), expected)


@pytest.mark.parametrize("max_kept_tokens", [0, 100])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_blocks_attend_as_in_double_precision(kv_heads, max_kept_tokens):
    """Values and gradients within what bf16 rounds away, and no worse than torch's own kernel."""
    rows = RowLengths((23, 1, 16))
    inputs = [
        (torch.randn(1, 40, heads, 16) * 3).bfloat16().transpose(1, 2).requires_grad_()
        for heads in (4, kv_heads, kv_heads)
    ]
    weight_1NSH = torch.randn(1, 4, 40, 16).bfloat16()

    def in_blocks(query_1NSH, key_1KSH, value_1KSH, rows):
        lengths, sizes = rows.lengths, {"num_block_tokens": 8, "max_kept_tokens": max_kept_tokens}
        return attend_blockwise(query_1NSH, key_1KSH, value_1KSH, lengths, **sizes)

    def results(attend, inputs):
        output = attend(*inputs, rows)
        gradients = torch.autograd.grad((output * weight_1NSH).sum(), inputs)
        return [result.double() for result in (output, *gradients)]

    expected = results(attend_row_by_row, [tensor.detach().double().requires_grad_() for tensor in inputs])
    ours = results(in_blocks, inputs)
    torchs = results(attend_row_by_row, inputs)
    for our, theirs, exact in zip(ours, torchs, expected, strict=True):
        assert (our - exact).norm() < max(2 * (theirs - exact).norm(), 2**-8 * exact.norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_weight_read_in_bands_multiplies_as_the_whole(dtype):
    """One of more than 2**22 weights is."""
    weight = nf4.quantize(torch.randn(2200, 2048) / 50, dtype)
    input = torch.randn(2, 5, 2048, dtype=dtype, requires_grad=True)
    grad_output = torch.randn(2, 5, 2200, dtype=dtype)
    dense = nf4.dequantize(weight, dtype)
    results = [
        (output, *torch.autograd.grad(output, input, grad_output))
        for output in (nf4_product.frozen_product(input, weight), F.linear(input, dense))
    ]
    torch.testing.assert_close(*results, **TOLERANCE[dtype])


def test_the_memory_of_dense_weights_is_shared_until_it_is_released():
    memory = nf4_product.DenseWeightMemory()
    with torch.inference_mode():
        first = memory.empty(torch.Size([4, 6]), torch.float32)
    second = memory.empty(torch.Size([3, 5]), torch.float32)
    assert (first.shape, second.shape) == ((4, 6), (3, 5))
    assert first.data_ptr() == second.data_ptr() and not second.is_inference()
    assert memory.empty(torch.Size([4, 6]), torch.bfloat16).data_ptr() != first.data_ptr()
    assert memory.empty(torch.Size([9, 9]), torch.float32).data_ptr() != first.data_ptr()
    kept = weakref.ref(memory.empty(torch.Size([1]), torch.float32)._base)
    assert kept() is not None
    memory.release()
    assert kept() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_variable_length_kernel_equals_the_row_loop(kv_heads):
    device = torch.device("cuda")
    rows = RowLengths((300, 7, 64)).to(device)
    inputs = [
        torch.randn(1, heads, 371, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    ]
    assert attention._variable_length_kernel_works(device, torch.bfloat16, 4, kv_heads, 64)
    results = []
    for attend in (attention.attend_within_rows_at_once, attend_row_by_row):
        output = attend(*inputs, rows)
        results.append((output, *torch.autograd.grad(output.float().square().sum(), inputs)))
    torch.testing.assert_close(*results, atol=5e-2, rtol=5e-2)
