"""Llama's gated feed-forward: down(silu(gate(x)) * up(x)), Shazeer 2020, arXiv 2002.05202."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_components.models.lora import lora_linears


class FeedForward(nn.Module):
    """SwiGLU with torchtune's parameter names, w1 gate, w2 down, w3 up; the adapters of gate and up share a product."""

    def __init__(self, *, gate_proj: nn.Module, down_proj: nn.Module, up_proj: nn.Module) -> None:
        super().__init__()
        self.w1 = gate_proj
        self.w2 = down_proj
        self.w3 = up_proj

    def forward(self, input: Tensor) -> Tensor:
        """(..., embed_dim) -> (..., embed_dim)."""
        return self.w2(self.gated(input))

    def gated(self, input: Tensor) -> Tensor:
        """Compute all but the last product: (..., embed_dim) -> (..., intermediate_dim)."""
        gate, up = lora_linears(input, (self.w1, self.w3))
        return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up that keeps gate and up for the backward, and computes silu(gate) there again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad_output * up, gate), grad_output * F.silu(gate)
