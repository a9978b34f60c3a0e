"""Root-mean-square normalization that keeps its input for the backward in the input's own dtype.

Zhang & Sennrich 2019, arXiv 1910.07467, equation 4: y = x / rms(x) * scale, rms(x) = sqrt(mean(x^2) + eps).
"""

from typing import Any

import torch
import torchtune.modules
from torch import Tensor


class RMSNorm(torchtune.modules.RMSNorm):
    """torchtune's RMSNorm, in fp32 as that one is, without its fp32 copy of every input waiting for the backward."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim), in the input's dtype."""
        return _RMSNorm.apply(x, self.scale, self.eps)


class _RMSNorm(torch.autograd.Function):
    """With n = x / rms(x) and g the gradient times scale, the gradient of x is (g - n mean(g n)) / rms(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        x_fp32 = x.float()
        inverse_rms = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, scale, inverse_rms)
        return (x_fp32 * inverse_rms).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, scale, inverse_rms = ctx.saved_tensors
        normalized = x.float() * inverse_rms
        grad_scale = None
        if ctx.needs_input_grad[1]:
            grad_scale = (grad_output * normalized).flatten(0, -2).sum(0)
        grad = grad_output * scale
        grad_x = (grad - normalized * (grad * normalized).mean(-1, keepdim=True)) * inverse_rms
        return grad_x.to(x.dtype), grad_scale, None
