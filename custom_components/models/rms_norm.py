"""Root-mean-square normalization that keeps its input for the backward in the input's dtype.

Zhang & Sennrich 2019, arXiv 1910.07467, equation 4: y = x / rms(x) * scale, rms(x) = sqrt(mean(x^2) + eps).
"""

from collections.abc import Callable
from typing import Any

import torch
import torchtune.modules
from torch import Tensor

_PIECE_TOKENS = 4096


class RMSNorm(torchtune.modules.RMSNorm):
    """torchtune's RMSNorm, computed in fp32 too, but without an fp32 copy of every input kept for the backward."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim), in the input's dtype."""
        return _RMSNorm.apply(x, self.scale, self.eps)


class _RMSNorm(torch.autograd.Function):
    """With r = rms(x) and g the gradient times scale, the gradient of x is g / r - x mean(g x) / r^3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_at_least_fp32(x))
        inverse_rms = torch.rsqrt(norm.square() / x.shape[-1] + eps)
        ctx.save_for_backward(x, scale, inverse_rms)
        return _piece_by_piece(lambda x, inverse_rms: (x * inverse_rms).mul_(scale).to(x.dtype), x, inverse_rms)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, scale, inverse_rms = ctx.saved_tensors
        grad_scale = None
        if ctx.needs_input_grad[1]:
            grad_scale = (grad_output * (x * inverse_rms)).flatten(0, -2).sum(0)

        # In place, because on the CPU most of the time goes into passes over fp32 copies.
        def grad_of(grad_output: Tensor, x: Tensor, inverse_rms: Tensor) -> Tensor:
            wide_x, grad = x.to(_at_least_fp32(x)), grad_output.to(_at_least_fp32(x)) * scale
            mean_product = torch.linalg.vecdot(grad, wide_x).unsqueeze(-1) / x.shape[-1]
            grad_x = grad.mul_(inverse_rms).addcmul_(wide_x, mean_product * inverse_rms.pow(3), value=-1)
            return grad_x.to(x.dtype)

        return _piece_by_piece(grad_of, grad_output, x, inverse_rms), grad_scale, None


def _piece_by_piece(compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Compute (..., tokens, dim) of inputs that are as long, some tokens at a time, as are then the copies in fp32."""
    num_tokens = inputs[0].shape[-2] if inputs[0].dim() > 1 else 1
    # Compiled, there are no copies.
    if num_tokens <= _PIECE_TOKENS or torch.compiler.is_compiling():
        return compute(*inputs)
    pieces = zip(*(input.split(_PIECE_TOKENS, dim=-2) for input in inputs), strict=True)
    output = torch.empty_like(inputs[0])
    for target, piece in zip(output.split(_PIECE_TOKENS, dim=-2), pieces, strict=True):
        target.copy_(compute(*piece))
    return output


def _at_least_fp32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
