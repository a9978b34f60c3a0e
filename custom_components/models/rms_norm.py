"""Root-mean-square normalization that keeps its input for the backward in the input's dtype.

Zhang & Sennrich 2019, arXiv 1910.07467, equation 4: y = x / rms(x) * scale, rms(x) = sqrt(mean(x^2) + eps).
"""

from typing import Any

import torch
import torchtune.modules
from torch import Tensor


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
        return (x * inverse_rms).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, scale, inverse_rms = ctx.saved_tensors
        grad_scale = None
        if ctx.needs_input_grad[1]:
            grad_scale = (grad_output * (x * inverse_rms)).flatten(0, -2).sum(0)
        # In place, because on the CPU most of the time goes into passes over fp32 copies.
        wide_x, grad = x.to(_at_least_fp32(x)), grad_output.to(_at_least_fp32(x)) * scale
        mean_product = torch.linalg.vecdot(grad, wide_x).unsqueeze(-1) / x.shape[-1]
        grad_x = grad.mul_(inverse_rms).addcmul_(wide_x, mean_product * inverse_rms.pow(3), value=-1)
        return grad_x.to(x.dtype), grad_scale, None


def _at_least_fp32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
