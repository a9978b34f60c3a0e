"""Rotary position embedding of neighbouring pairs, in fp32: Su et al. 2021, arXiv 2104.09864, section 3.2.2.

Dimensions: `B` batch, `S` positions, `N` heads, `H` head_dim, `P` pairs, head_dim / 2.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torchtune.modules import RotaryPositionalEmbeddings

from custom_components.models.shapes import LlamaShape, RopeScaling


class RotaryPositions(RotaryPositionalEmbeddings):
    """torchtune's rotary embedding, bit for bit, in a quarter of its time on the CPU: each pair is a complex number.

    Args:
        scaling: how the frequencies differ from those of `base`; None: not at all.
    """

    def __init__(
        self, dim: int, max_seq_len: int = 4096, base: float = 10_000.0, scaling: RopeScaling | None = None
    ) -> None:
        super().__init__(dim, max_seq_len, base)
        self.scaling = scaling
        if scaling is not None:
            self.theta.div_(frequency_divisors_P(self.theta, scaling))
            self.build_rope_cache(max_seq_len)

    @property
    def rotations_SP(self) -> Tensor:
        """The rotation of each pair at each position, a complex number: (max_seq_len, P)."""
        return torch.view_as_complex(self.cache.float())  # a model may be cast to 16 bits, buffers included

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        """(B, S, N, H) -> (B, S, N, H), at positions (B, S), or (S,) for every row; default 0 .. S-1.

        While decoding, S is 1 and torchtune gives one position a row, (B,).
        """
        if torch.compiler.is_compiling():  # which fuses torchtune's operations, and cannot read complex numbers
            return super().forward(x, input_pos=input_pos)
        rotations = self.rotations_SP[: x.shape[1]] if input_pos is None else self.rotations_SP[input_pos]
        return _Rotate.apply(x, rotations.view(-1, x.shape[1], 1, rotations.shape[-1]))


def frequency_divisors_P(frequencies_P: Tensor, scaling: RopeScaling) -> Tensor:
    """Give what each frequency is divided by so that a model reads longer texts than it was pretrained on.

    Linear: Chen et al. 2023, arXiv 2306.15595. llama3: meta-llama/llama-models @43e87a3, models/llama3/model.py,
    `apply_scaling`: high frequencies stay, low ones are divided by the factor, and those between by something between.
    """
    if scaling.kind == "linear":
        return torch.full_like(frequencies_P, scaling.factor)
    num_turns_P = scaling.original_max_seq_len * frequencies_P / (2 * math.pi)
    kept_P = (num_turns_P - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept_P = kept_P.clamp(0, 1)
    return 1 / ((1 - kept_P) / scaling.factor + kept_P)


def rope_frequency_divisors_P(shape: LlamaShape) -> Tensor:
    """Give the divisors of a model's frequencies; they have to be scaled."""
    assert shape.rope_scaling is not None
    pairs_P = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device="cpu")
    return frequency_divisors_P(1 / shape.rope_base ** (pairs_P / shape.head_dim), shape.rope_scaling)


class _Rotate(torch.autograd.Function):
    """Rotates pairs; the gradient is rotated back by the same angles."""

    @staticmethod
    def forward(ctx: Any, heads_BSNH: Tensor, rotations_BS1P: Tensor) -> Tensor:
        ctx.save_for_backward(rotations_BS1P)
        return rotate(heads_BSNH, rotations_BS1P)

    @staticmethod
    def backward(ctx: Any, grad_BSNH: Tensor) -> tuple[Tensor, None]:
        [rotations_BS1P] = ctx.saved_tensors
        return rotate(grad_BSNH, rotations_BS1P.conj()), None


def rotate(heads_BSNH: Tensor, rotations_BS1P: Tensor) -> Tensor:
    """Rotate neighbouring pairs by complex numbers of length 1, in the input's dtype."""
    rotated_BSNH = heads_BSNH.to(torch.float32, copy=True)
    torch.view_as_complex(rotated_BSNH.unflatten(-1, (-1, 2))).mul_(rotations_BS1P)
    return rotated_BSNH.to(heads_BSNH.dtype)
