"""The layers that keep less for the backward, or take less time, compute what torch's and torchtune's do."""

import pytest
import torch
import torch.nn.functional as F
import torchtune.modules

from custom_components.models.feed_forward import _SwiGLU
from custom_components.models.rms_norm import RMSNorm
from custom_components.models.rotary import RotaryPositions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_torchtunes(dtype):
    torch.manual_seed(0)
    x = (torch.randn(2, 5, 64) * 3).to(dtype).requires_grad_()
    results = []
    for norm in (RMSNorm(64, eps=1e-5), torchtune.modules.RMSNorm(64, eps=1e-5)):
        norm.scale.data = torch.linspace(0.5, 2, 64)
        output = norm(x)
        grads = torch.autograd.grad(output.float().pow(3).sum(), (x, norm.scale))
        assert output.dtype is dtype
        results.append((output, *grads))
    # The scale's gradient is a sum of cubes that cancel: fp32 keeps four digits of it.
    torch.testing.assert_close(*results, **({"atol": 1e-4, "rtol": 1e-4} if dtype is torch.float32 else {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_tokens", "positions"),
    [(3, None), (3, [[4, 0, 1], [7, 2, 2]]), (3, [4, 5, 6]), (1, [5, 3]), (1, [5]), (1, 5), (1, [[5], [3]])],
)
def test_rotary_positions_equal_torchtunes_to_the_bit(dtype, num_tokens, positions):
    """torchtune's generation gives one position a row while decoding, and a scalar for a prompt of one token."""
    heads = torch.randn(2, num_tokens, 4, 16, dtype=dtype, requires_grad=True)
    grad_output = torch.randn(2, 4, num_tokens, 16, dtype=dtype).transpose(1, 2)
    results = []
    for rope in (RotaryPositions(16, 8), torchtune.modules.RotaryPositionalEmbeddings(16, 8)):
        output = rope(heads, input_pos=None if positions is None else torch.tensor(positions))
        results.append((output, *torch.autograd.grad(output, heads, grad_output)))
    torch.testing.assert_close(*results, atol=0, rtol=0)


def test_a_model_may_be_cast_to_16_bits_as_a_whole():
    heads = torch.randn(1, 3, 4, 16, dtype=torch.bfloat16)
    output = RotaryPositions(16, 8).to(torch.bfloat16)(heads)
    torch.testing.assert_close(output, RotaryPositions(16, 8)(heads), atol=2e-2, rtol=2e-2)


def test_gradients_are_those_of_finite_differences():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    gate, up = torch.randn(2, 3, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(_SwiGLU.apply, (gate, up))
    torch.testing.assert_close(_SwiGLU.apply(gate, up), F.silu(gate) * up)
    expected = torch.autograd.grad(F.rms_norm(x, (8,), eps=1e-6).pow(2)[:, 0].sum(), x)
    norm = RMSNorm(8, eps=1e-6)
    result = torch.autograd.grad(norm(x).pow(2)[:, 0].sum(), x)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)


def test_less_waits_for_the_backward():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        x = torch.randn(1, 6, 64, dtype=torch.bfloat16, requires_grad=True)
        RMSNorm(64)(x)
        _SwiGLU.apply(x, x)
    assert all(tensor.dtype is torch.bfloat16 for tensor in kept if tensor.numel() >= x.numel())
