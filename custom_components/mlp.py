"""Llama's gated feed-forward: down(silu(gate(x)) * up(x)), Shazeer 2020, arXiv 2002.05202."""

import torch.nn.functional as F
from torch import Tensor, nn

from custom_components.lora import lora_linears


class FeedForward(nn.Module):
    """SwiGLU with torchtune's parameter names, w1 gate, w2 down, w3 up; the adapters of gate and up share a product."""

    def __init__(self, *, gate_proj: nn.Module, down_proj: nn.Module, up_proj: nn.Module) -> None:
        super().__init__()
        self.w1 = gate_proj
        self.w2 = down_proj
        self.w3 = up_proj

    def forward(self, input: Tensor) -> Tensor:
        """(..., embed_dim) -> (..., embed_dim)."""
        gate, up = lora_linears(input, (self.w1, self.w3))
        return self.w2(F.silu(gate) * up)
