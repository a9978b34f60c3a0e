"""The formats in which a frozen weight may be kept: NF4, with double quantization or without, and int8.

NF4 is that of :mod:`nf4`. int8 is torchao's weight-only int8 (Int8Tensor, symmetric, one scale for each output): the
weight is dequantized for each product, as NF4 is, so activations are never quantized.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torchao.dtypes.nf4tensor import NF4Tensor
from torchao.quantization import Int8Tensor, PerRow

from custom_components.models import nf4

# "nf4": QLoRA's, its scalers in int8; "nf4_single": its scalers in fp32.
Quantization = Literal["nf4", "nf4_single", "int8"]
NONE = "none"
WORDS = {
    "nf4": "4-bit NF4 with double quantization",
    "nf4_single": "4-bit NF4 without double quantization",
    "int8": "8-bit integers",
}


def chosen_quantization(quantize_base: bool, quantization: str | None) -> Quantization | None:
    """Tell which format the two settings choose; None: the weights stay in the compute dtype.

    Args:
        quantization: a format or "none"; None leaves it to `quantize_base`, where true is "nf4".

    Raises:
        ValueError: there is no such format, or the two are at odds.
    """
    if quantization is None:
        return "nf4" if quantize_base else None
    formats = get_args(Quantization)
    if quantization not in (*formats, NONE):
        raise ValueError(f"quantization: {quantization!r} is none of {', '.join(formats)} and {NONE}")
    if quantize_base and quantization != "nf4":
        raise ValueError(
            f"quantization: {quantization!r} beside quantize_base true, which is nf4; set one of them only"
        )
    return next((name for name in formats if name == quantization), None)


def can_quantize(shape: torch.Size | tuple[int, ...], quantization: Quantization) -> bool:
    """Check whether a weight of this shape can be kept in this format: NF4 has blocks."""
    return len(shape) == 2 if quantization == "int8" else nf4.can_quantize(shape)


def is_quantized(weight: Tensor) -> bool:
    return isinstance(weight, NF4Tensor | Int8Tensor)


def quantize(weight: Tensor, quantization: Quantization, dtype: torch.dtype | None = None) -> Tensor:
    """Quantize a weight on its device; `dtype` is what it is dequantized to, by default its own."""
    if quantization != "int8":
        return nf4.quantize(weight, dtype, double=quantization == "nf4")
    quantized = Int8Tensor.from_hp(weight.detach().float(), PerRow())
    return from_stored_tensors([quantized.qdata, quantized.scale], weight.shape, dtype or weight.dtype)


def dequantize(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize a weight to an ordinary tensor of `dtype`."""
    return weight.dequantize(dtype) if isinstance(weight, Int8Tensor) else nf4.dequantize(weight, dtype)


def stored_tensors(weight: Tensor) -> list[Tensor]:
    """List the tensors that hold a weight: an ordinary one itself, else its codes and scalers."""
    return [weight.qdata, weight.scale] if isinstance(weight, Int8Tensor) else nf4.stored_tensors(weight)


def num_stored_tensors(quantization: Quantization) -> int:
    return 2 if quantization == "int8" else 4


def from_stored_tensors(tensors: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Rebuild a weight of this shape from its :func:`stored_tensors`."""
    if len(tensors) == num_stored_tensors("int8"):
        codes, scale = tensors
        return Int8Tensor(codes, scale, [1, shape[1]], dtype)
    return nf4.from_stored_tensors(tensors, shape, dtype)


def empty(
    shape: torch.Size, quantization: Quantization, dtype: torch.dtype, device: torch.device | None = None
) -> Tensor:
    """Allocate a weight of this shape without values, as `torch.empty` does."""
    if quantization != "int8":
        return nf4.empty(shape, dtype, device, double=quantization == "nf4")
    codes = torch.empty(shape, dtype=torch.int8, device=device)
    return from_stored_tensors([codes, torch.empty(shape[0], 1, device=device)], shape, dtype)
