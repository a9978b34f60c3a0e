"""L7 to L16: the loss, the model's numbers and the adapters'."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torchao.dtypes.nf4tensor import NF4Tensor

from custom_components.datasets.batching import BatchPlan, collate
from custom_components.datasets.packing import row_order
from custom_components.models import nf4
from custom_components.models.attention import RowLengths
from custom_components.models.hidden_states import final_hidden_states
from custom_components.models.lora import LoRALinear
from custom_components.runtime.errors import UserError
from custom_components.training.gradients import ForwardOptions, accumulate_gradients, supervised_loss
from custom_components.training.loss import LinearCrossEntropy
from custom_components.training.optimizer import stop_if_not_finite
from tests.support.models import CPU, loaded_model, whole_model, with_random_adapters
from tests.support.paths import TINY_LLAMA
from tests.support.rows import random_rows


def gradients_of_step(model, rows, batch_size, num_recomputed_layers=0, pack_capacity=None):
    model.zero_grad(set_to_none=True)
    plan = BatchPlan(batch_size, len(rows), shuffle=False, seed=0, pack_capacity_tokens=pack_capacity)
    [forwards] = plan.steps([len(row["tokens"]) for row in rows], epoch=0)
    batches = [collate([rows[index] for index in forward]) for forward in forwards]
    no_scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss_of = supervised_loss(model, LinearCrossEntropy(chunk_size=7), ForwardOptions(num_recomputed_layers))
    loss = accumulate_gradients(batches, loss_of, no_scaler, CPU)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def plain_loss(model, rows):
    """Row by row, with torch's own cross-entropy over torchtune's own forward."""
    total, num_supervised = 0.0, 0
    for row in rows:
        logits = model(torch.tensor([row["tokens"]]))[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total = total + F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
        num_supervised += int((labels != -100).sum())
    return total / num_supervised


@pytest.mark.parametrize("apply_lora_to_output", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_L07_L08_a_step_is_the_same_however_it_is_cut(make_checkpoint, apply_lora_to_output, tied):
    """N forwards of one row, one of N, a partial last one and packs give the loss and gradients of the rows apart."""
    checkpoint = make_checkpoint(tie_word_embeddings=tied)
    model = with_random_adapters(loaded_model(checkpoint, apply_lora_to_output=apply_lora_to_output))
    rows = random_rows(7)
    expected_loss = plain_loss(model, rows)
    expected_loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    for batch_size, pack_capacity in ((1, None), (2, None), (3, None), (7, None), (1, 40), (2, 60)):
        loss, gradients = gradients_of_step(model, rows, batch_size, pack_capacity=pack_capacity)
        torch.testing.assert_close(loss, expected_loss.detach(), atol=1e-5, rtol=0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4, msg=name)


def test_L08_a_row_does_not_see_the_rows_beside_it(make_checkpoint):
    model = loaded_model(make_checkpoint())
    first, second, other = ([row] for row in random_rows(2, seed=3) + random_rows(1, seed=4))

    def hidden_states(rows):
        batch = collate(rows)
        return final_hidden_states(
            model, batch.tokens_1T, RowLengths(batch.row_lengths, batch.boundaries), batch.positions_1T
        )

    length = len(second[0]["tokens"])
    torch.testing.assert_close(hidden_states(first + second)[:, -length:], hidden_states(other + second)[:, -length:])


def test_L08_labels_at_a_boundary_predict_nothing():
    batch = collate([{"tokens": [1, 5, 2], "labels": [-100, 5, 2]}, {"tokens": [1, 7, 2], "labels": [1, 7, 2]}])
    assert batch.labels_1T.tolist() == [[5, 2, -100, 7, 2, -100]]
    assert batch.positions_1T.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert batch.row_lengths == (3, 3)


@pytest.mark.parametrize(
    "model_of",
    [loaded_model, partial(loaded_model, apply_lora_to_output=True), whole_model],
    ids=["adapter", "adapter on the head", "whole"],
)
def test_L09_a_forward_without_supervised_tokens_contributes_zero(make_checkpoint, model_of):
    model = with_random_adapters(model_of(make_checkpoint()))
    rows = random_rows(4)
    masked = {"tokens": [1, 5, 6, 7], "labels": [-100] * 4}
    loss, gradients = gradients_of_step(model, rows, 1)
    loss_beside_masked, gradients_beside_masked = gradients_of_step(model, [masked, *rows], 1)
    assert loss == loss_beside_masked
    assert all(torch.equal(gradients[name], gradients_beside_masked[name]) for name in gradients)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_L09_a_loss_or_gradient_that_is_not_finite_stops_the_run(value):
    with pytest.raises(UserError, match=r"step 7: .*\[\[3, 4\]\]"):
        stop_if_not_finite(value, 1.0, 7, [[3, 4]])
    with pytest.raises(UserError, match="step 7"):
        stop_if_not_finite(1.0, value, 7, [[3, 4]])


@pytest.mark.parametrize("num_rows", [1, 5, 8, 9])
def test_L10_every_row_is_trained_on_in_every_epoch(num_rows):
    steps = BatchPlan(4, 2, shuffle=True, seed=0).steps([5] * num_rows, epoch=0)
    assert steps
    assert sorted(index for step in steps for forward in step for index in forward) == list(range(num_rows))
    assert all(len(forward) <= 4 for step in steps for forward in step)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4, "rms_norm_eps": 1e-3, "rope_theta": 500.0},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
    ],
)
def test_L11_logits_equal_those_of_transformers(make_checkpoint, changes):
    assert_logits_equal_those_of_transformers(make_checkpoint(**changes), vocab_size=1024)


def test_L11_logits_of_the_embedded_model():
    assert_logits_equal_those_of_transformers(TINY_LLAMA / "checkpoint", vocab_size=1024)


def test_L11_logits_of_stories260k(test_data):
    assert_logits_equal_those_of_transformers(test_data("stories260K/config.json").parent, vocab_size=512)


def assert_logits_equal_those_of_transformers(checkpoint, vocab_size):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokens = torch.randint(vocab_size, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded_model(checkpoint)(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_L12_adapters_and_their_optimizer_state_are_fp32(make_checkpoint, dtype):
    model = loaded_model(make_checkpoint(), dtype, quantize_base=dtype is not torch.float32)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-3)
    gradients_of_step(model, random_rows(2), 2)
    optimizer.step()
    assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in adapters)
    state = [value for values in optimizer.state.values() for name, value in values.items() if name != "step"]
    assert state and all(value.dtype == torch.float32 for value in state)


def base_bytes(model):
    """Every byte of the frozen parameters, NF4 storage included."""
    stored = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter.data, NF4Tensor):
            for part in ("quantized_data", "quantized_scalers", "quantization_factor", "scaler_mean"):
                stored[f"{name}.{part}"] = getattr(parameter.data, part).clone()
        elif not parameter.requires_grad:
            stored[name] = parameter.detach().clone()
    return stored


@pytest.mark.parametrize("quantize_base", [False, True])
def test_L12_the_base_is_the_same_after_training(make_checkpoint, quantize_base):
    model = loaded_model(make_checkpoint(), quantize_base=quantize_base)
    before = base_bytes(model)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    for _ in range(3):
        gradients_of_step(model, random_rows(3), 2)
        optimizer.step()
    after = base_bytes(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("num_recomputed_layers", [0, 2])
def test_L14_every_adapter_tensor_has_a_gradient_after_the_first_backward(make_checkpoint, num_recomputed_layers):
    model = loaded_model(make_checkpoint(), torch.bfloat16, quantize_base=True, apply_lora_to_output=True)
    _, gradients = gradients_of_step(model, random_rows(4), 2, num_recomputed_layers)
    assert len(gradients) == 2 * (7 * 2 + 1)
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        assert gradient.any() == ("lora_b" in name), name  # A's is zero as long as B is


def test_L14_recomputed_layers_give_the_same_gradients(make_checkpoint):
    model = with_random_adapters(loaded_model(make_checkpoint(), quantize_base=True, lora_dropout=0.3))
    results = []
    for num_recomputed_layers in (0, 1, 2):
        torch.manual_seed(0)
        results.append(gradients_of_step(model, random_rows(4), 2, num_recomputed_layers))
    (loss, gradients), *others = results
    for other_loss, other_gradients in others:
        assert loss == other_loss
        assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 512), (100, 192), (172, 64), (200, 96), (64, 172)])
def test_L15_one_nf4_storage_is_read_alike_by_all(dtype, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    quantized = nf4.quantize(weight, dtype)
    by_table = nf4.dequantize_with_table(quantized, dtype).float()
    # torchao's codebook has 4 places, bitsandbytes' has 8: up to 5e-5 of a block's largest weight, here about 0.08.
    tolerance = 3e-4 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(nf4.dequantize(quantized, dtype).float(), by_table, atol=tolerance, rtol=0)
    # torchao rounds the scalers to the dtype before it multiplies
    torch.testing.assert_close(quantized.get_original_weight().float(), by_table, atol=3 * tolerance, rtol=0)


def test_L15_nf4_is_as_close_to_the_weight_as_bitsandbytes_and_as_small():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    quantized = nf4.quantize(weight, torch.float32)
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    theirs = (functional.dequantize_4bit(codes, state) - weight).norm()
    assert (nf4.dequantize(quantized, torch.float32) - weight).norm() <= 1.01 * theirs
    stored = (
        quantized.quantized_data,
        quantized.quantized_scalers,
        quantized.quantization_factor,
        quantized.scaler_mean,
    )
    num_bits = 8 * sum(tensor.numel() * tensor.element_size() for tensor in stored)
    assert num_bits / weight.numel() <= 4.13


def test_L15_a_block_of_zeros_stays_zero():
    weight = torch.zeros(64, 256)
    weight[0, :64] = 0.5
    assert not nf4.dequantize(nf4.quantize(weight), torch.float32)[1:].abs().max() > 1e-2


def test_L16_one_seed_draws_one_adapter_and_one_order(make_checkpoint):
    checkpoint = make_checkpoint()
    adapters = [
        [
            module.lora_a.weight
            for module in loaded_model(checkpoint, seed=seed).modules()
            if isinstance(module, LoRALinear)
        ]
        for seed in (0, 0, 1)
    ]
    assert all(map(torch.equal, adapters[0], adapters[1]))
    assert not any(map(torch.equal, adapters[0], adapters[2]))
    assert row_order(50, 3, 0, True) == row_order(50, 3, 0, True)
    assert row_order(50, 3, 0, True) != row_order(50, 3, 1, True) != row_order(50, 4, 0, True)


def test_dropout_is_drawn_anew_in_every_forward(make_checkpoint):
    model = with_random_adapters(loaded_model(make_checkpoint(), lora_dropout=0.5)).train()
    tokens = torch.randint(1024, (1, 9))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
