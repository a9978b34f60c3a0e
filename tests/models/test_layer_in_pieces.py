"""A layer that keeps only its input computes what any layer does, and needs the memory that it says."""

from functools import partial

import pytest
import torch

from custom_components.memory.simulated_step import LiveBytes
from custom_components.models import layer_in_pieces as in_pieces
from custom_components.models.attention import RowLengths
from custom_components.models.layer import LlamaLayer
from custom_components.models.layer_in_pieces import KEPT_IN_PLACE, layer_in_pieces, recomputed_layer
from custom_components.models.llama import full_llama
from custom_components.models.shapes import LlamaShape
from tests.support.models import loaded_model, with_random_adapters

LENGTHS = (20, 1, 16)
POSITIONS_1T = torch.tensor([[position for length in LENGTHS for position in range(length)]])
TOLERANCE = {torch.float32: {"atol": 1e-5, "rtol": 1e-5}, torch.bfloat16: {"atol": 6e-2, "rtol": 5e-2}}


def results(layer, compute, *, needs_input_grad=True):
    """The output of a layer, and the gradients of its input and of what is trained."""
    dtype, embed_dim = layer.attn.q_proj.weight.dtype, layer.sa_norm.scale.numel()
    random = torch.Generator().manual_seed(0)
    input_1TD = torch.randn(1, sum(LENGTHS), embed_dim, generator=random).to(dtype)
    input_1TD.requires_grad_(needs_input_grad)
    layer.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    output_1TD = compute(layer, input_1TD)
    output_1TD.backward(torch.randn(output_1TD.shape, generator=random).to(dtype))
    gradients = {name: value.grad for name, value in layer.named_parameters() if value.requires_grad}
    return output_1TD.detach(), input_1TD.grad, gradients


def plain(layer, input_1TD):
    return layer(input_1TD, mask=RowLengths(LENGTHS), input_pos=POSITIONS_1T)


def recomputed(layer, input_1TD, piece_tokens=9):
    return recomputed_layer(layer, input_1TD, RowLengths(LENGTHS), POSITIONS_1T, KEPT_IN_PLACE, piece_tokens)


def kept(layer, input_1TD):
    return layer_in_pieces(layer, input_1TD, RowLengths(LENGTHS), POSITIONS_1T, piece_tokens=9)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "lora",
    [{}, {"quantize_base": True}, {"use_dora": True}, {"apply_lora_to_mlp": False}, {"lora_attn_modules": ["v_proj"]}],
    ids=str,
)
def test_pieces_equal_the_whole(make_checkpoint, dtype, lora):
    [layer, _] = with_random_adapters(loaded_model(make_checkpoint(), dtype, **lora)).layers
    assert isinstance(layer, LlamaLayer)
    for needs_input_grad in (True, False):
        expected = results(layer, plain, needs_input_grad=needs_input_grad)
        for compute in (recomputed, kept):
            actual = results(layer, compute, needs_input_grad=needs_input_grad)
            torch.testing.assert_close(actual, expected, **TOLERANCE[dtype])


def test_pieces_equal_the_whole_where_its_weights_are_trained():
    torch.manual_seed(0)
    [layer] = full_llama(LlamaShape(64, 1, 4, 2, 32, 48, 64)).layers
    torch.testing.assert_close(results(layer, recomputed), results(layer, plain), atol=1e-5, rtol=1e-5)


def test_one_piece_is_the_whole_bit_for_bit_and_dropout_draws_alike(make_checkpoint):
    """So that a step is the same whether its layers are recomputed or not, if their pieces are the same."""
    [layer, _] = with_random_adapters(loaded_model(make_checkpoint(), lora_dropout=0.3)).train().layers
    torch.testing.assert_close(
        results(layer, partial(recomputed, piece_tokens=sum(LENGTHS))), results(layer, plain), atol=0, rtol=0
    )
    output, *gradients = results(layer, kept)
    recomputed_output, *recomputed_gradients = results(layer, recomputed)
    assert torch.equal(recomputed_output, output) and not torch.equal(output, results(layer, plain)[0])
    torch.testing.assert_close(recomputed_gradients, gradients, atol=1e-5, rtol=1e-5)


def test_a_long_row_is_in_pieces_recomputed_or_not(make_checkpoint, monkeypatch):
    """By the layer itself: the number of tokens decides, and dropout draws the same either way."""
    [layer, _] = with_random_adapters(loaded_model(make_checkpoint(), lora_dropout=0.3)).train().layers
    monkeypatch.setattr("custom_components.models.layer.PIECE_TOKENS", 9)
    monkeypatch.setattr(in_pieces.layer_in_pieces, "__defaults__", (9,))
    monkeypatch.setattr(in_pieces.recomputed_layer, "__defaults__", (9,))

    def with_inputs_kept(layer, input_1TD):
        return layer(input_1TD, mask=RowLengths(LENGTHS), input_pos=POSITIONS_1T, kept_in=KEPT_IN_PLACE)

    torch.testing.assert_close(results(layer, with_inputs_kept), results(layer, plain), atol=1e-5, rtol=1e-5)


def test_the_feed_forward_of_all_tokens_is_never_there():
    """Of a layer with a wide feed-forward the memory is far below that of its activations."""
    num_tokens, embed_dim, intermediate_dim = 512, 16, 4096
    torch.manual_seed(0)
    [layer] = full_llama(LlamaShape(64, 1, 2, 2, embed_dim, intermediate_dim, num_tokens), ["norm"]).layers
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    layer.sa_norm.scale.requires_grad_()
    input_1TD = torch.randn(1, num_tokens, embed_dim, requires_grad=True)
    rows, positions_1T = RowLengths((num_tokens,)), torch.arange(num_tokens)[None]
    peak_bytes = {}
    for piece_tokens in (num_tokens, num_tokens // 16):
        with LiveBytes() as memory:
            recomputed_layer(layer, input_1TD, rows, positions_1T, KEPT_IN_PLACE, piece_tokens).sum().backward()
        peak_bytes[piece_tokens] = memory.peak_bytes
    one_activation_bytes = num_tokens * intermediate_dim * 4
    assert peak_bytes[num_tokens] > 3 * one_activation_bytes > 6 * peak_bytes[num_tokens // 16]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_inputs_come_back_from_the_hosts_memory(make_checkpoint):
    """Several blocks of pinned memory each, two steps, and the gradients of inputs that stay on the card."""
    from custom_components.models.host_inputs import HostInputs

    device = torch.device("cuda")
    model = with_random_adapters(loaded_model(make_checkpoint())).to(device)
    rows = RowLengths((4096,) * 300).to(device)
    positions_1T = torch.arange(4096, device=device).repeat(300)[None]
    in_host = HostInputs(device)
    for _ in range(2):
        gradients = []
        for inputs in (KEPT_IN_PLACE, in_host):
            model.zero_grad(set_to_none=True)
            torch.manual_seed(0)
            hidden_1TD = torch.randn(1, positions_1T.numel(), 64, device=device)
            for layer in model.layers:
                hidden_1TD = recomputed_layer(layer, hidden_1TD, rows, positions_1T, inputs)
            hidden_1TD.square().mean().backward()
            gradients.append([value.grad.clone() for value in model.parameters() if value.grad is not None])
        torch.testing.assert_close(*gradients, atol=0, rtol=0)
