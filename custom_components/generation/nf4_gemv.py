"""Products of NF4 weights with a few rows, for answering token by token: memory-bound, never dequantized.

bitsandbytes' operator `gemv_4bit` reads 4-bit weights as they are. On CUDA its layout is that of :mod:`nf4`. On CPUs
with AVX512-bf16 it is another, `packed` here, in which its kernel also multiplies more than one row.

Dimensions: `R` rows, `I` in_dim, `O` out_dim, `J` in_dim / 2, `T` out_dim / 32.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_components.models import nf4
from custom_components.runtime.quiet_bitsandbytes import import_bitsandbytes

_PACKED_ROWS = 32
# Above, dequantizing once costs less than the kernel does: measured at 5632x2048 on two cores with AVX512-bf16.
_MAX_PACKED_PRODUCT_ROWS = 192


def can_multiply(weights: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Tell whether the weights can become one :class:`NF4GemvLinear` here, for inputs of `dtype`."""
    if not all(nf4.is_quantized(weight) for weight in weights):
        return False
    # A row of another length begins within a block, which the kernels do not expect.
    if any(weight.shape[1] % nf4.BLOCK_SIZE for weight in weights):
        return False
    device_type = weights[0].device.type
    if device_type == "cpu" and (dtype != torch.bfloat16 or any(weight.shape[0] % _PACKED_ROWS for weight in weights)):
        return False
    return device_type in ("cpu", "cuda") and gemv_works(device_type, dtype)


class NF4GemvLinear(nn.Module):
    """`input @ weight.T` for NF4 weights of one in_dim, stacked by rows; for inference.

    Args:
        weights: NF4 tensors for which `can_multiply` is true.
        dtype: of the inputs.
    """

    codes: Tensor
    scalers: Tensor
    codebook: Tensor

    def __init__(self, weights: Sequence[nf4.NF4Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.in_dim = weights[0].shape[1]
        self.out_dim = sum(weight.shape[0] for weight in weights)
        self.dtype = dtype
        self.is_packed = weights[0].device.type == "cpu"
        codes_OJ = torch.cat([weight.quantized_data.view(weight.shape[0], -1) for weight in weights])
        # note: kept dequantized, 4 (packed: 2) bytes for 64 weights, because they cost as much as the product itself.
        scalers = torch.cat([nf4.block_scalers(weight) for weight in weights])
        if self.is_packed:
            codes_OJ = packed(codes_OJ)
            scalers = scalers.view(self.out_dim, -1).T.to(torch.bfloat16).contiguous()
        self.register_buffer("codes", codes_OJ, persistent=False)
        self.register_buffer("scalers", scalers, persistent=False)
        self.register_buffer("codebook", nf4.codebook(scalers.device), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply: (R, in_dim) -> (R, out_dim)."""
        if len(input) <= (_MAX_PACKED_PRODUCT_ROWS if self.is_packed else 1):
            return torch.ops.bitsandbytes.gemv_4bit(
                input, self.codes, (self.out_dim, self.in_dim), self.scalers, self.codebook, nf4.BLOCK_SIZE
            )
        return F.linear(input, self.dequantized())

    def dequantized(self) -> Tensor:
        """Dequantize the weight: (out_dim, in_dim)."""
        codes, scalers = self.codes, self.scalers
        if self.is_packed:
            codes, scalers = unpacked(codes), scalers.T.float().flatten()
        return torch.ops.bitsandbytes.dequantize_4bit(
            codes.view(-1, 1), scalers, nf4.BLOCK_SIZE, "nf4", (self.out_dim, self.in_dim), self.dtype
        )


def packed(codes_OJ: Tensor) -> Tensor:
    """Pack codes as the CPU kernel reads them, (T, J, 32).

    For 32 rows and two columns at a time, byte 2r + c holds column c of row r in its low half, of row 16 + r in its
    high half. `codes_OJ` has two columns in a byte, the first in the high half. The layout is bitsandbytes 0.50's;
    `gemv_works` tests that it still is.
    """
    halves_THRJ = codes_OJ.view(-1, 2, _PACKED_ROWS // 2, codes_OJ.shape[1])
    low_TRJ, high_TRJ = halves_THRJ[:, 0], halves_THRJ[:, 1]
    pairs = torch.stack([low_TRJ >> 4 | high_TRJ & 0xF0, low_TRJ & 0xF | high_TRJ << 4], dim=-1)
    return pairs.transpose(1, 2).reshape(len(halves_THRJ), -1, _PACKED_ROWS)


def unpacked(codes_TJ32: Tensor) -> Tensor:
    """Undo `packed`: (O, J)."""
    pairs = codes_TJ32.view(*codes_TJ32.shape[:2], _PACKED_ROWS // 2, 2).transpose(1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    halves_THRJ = torch.stack([first << 4 | second & 0xF, first & 0xF0 | second >> 4], dim=1)
    return halves_THRJ.view(-1, codes_TJ32.shape[1])


@functools.cache
def gemv_works(device_type: str, dtype: torch.dtype) -> bool:
    """Try on a small weight whether this bitsandbytes multiplies as it should on this kind of device."""
    if import_bitsandbytes() is None:
        return False
    generator = torch.Generator().manual_seed(0)
    weight = nf4.quantize(torch.randn(64, 128, generator=generator).to(device_type), dtype)
    input = torch.randn(1, 128, generator=generator).to(device_type, dtype)
    try:
        output = NF4GemvLinear([weight], dtype)(input)
    except (RuntimeError, AttributeError, ValueError):
        return False
    expected = F.linear(input.float(), nf4.dequantize_with_table(weight, torch.float32))
    return torch.allclose(output.float(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
