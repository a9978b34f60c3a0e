"""The NF4 format: how a weight is quantized, stored and dequantized.

NF4 is QLoRA's 4-bit NormalFloat with double quantization (Dettmers et al. 2023, arXiv 2305.14314, sections 3 and
appendix E): blocks of 64 weights share an absmax scaler; the scalers, less their mean, are stored as int8 in blocks
of 256. Without double quantization they are stored in fp32, in one block with the factor 1 and the mean 0. The storage
is torchao's NF4Tensor, which bitsandbytes' operator reads as well (the same codebook, high nibble first), so that there
is one format and several ways to read it.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchao.dtypes.nf4tensor import NF4Tensor, SubclassTensorArgs

from custom_components.runtime.quiet_bitsandbytes import import_bitsandbytes

BLOCK_SIZE = 64
MAX_SCALER_BLOCK_SIZE = 256
_NUM_BLOCKS_AT_A_TIME = {"cpu": 2**12, "cuda": 2**16}

# The 16 codes: torchao 0.15.0, dtypes/nf4tensor.py, NF4Tensor.from_tensor; the paper's appendix E rounded to 4 places.
_CODEBOOK = (
    *(-1.0000, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0000),
    *(0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0000),
)


def can_quantize(shape: torch.Size | tuple[int, ...]) -> bool:
    """Check whether a weight of this shape divides into NF4 blocks."""
    return len(shape) == 2 and torch.Size(shape).numel() % BLOCK_SIZE == 0


def is_quantized(weight: Tensor) -> bool:
    return isinstance(weight, NF4Tensor)


def quantize(weight: Tensor, dtype: torch.dtype | None = None, *, double: bool = True) -> NF4Tensor:
    """Quantize a weight to NF4, on its device.

    Args:
        weight: (out_dim, in_dim), any floating dtype, `can_quantize`.
        dtype: the dtype that torchao dequantizes to; default: the weight's.
        double: quantize the scalers too.

    The nearest code is found by bucketizing over the midpoints between codes, and the scalers stay in fp32: both
    are faster and closer to the original than torchao's own `to_nf4`, and the storage is the same.
    """
    assert can_quantize(weight.shape), weight.shape
    dtype = dtype or weight.dtype
    num_blocks = weight.numel() // BLOCK_SIZE
    levels = codebook(weight.device)
    midpoints = (levels[1:] + levels[:-1]) / 2
    scalers = torch.empty(num_blocks, device=weight.device)
    packed_codes = torch.empty(weight.numel() // 2, dtype=torch.uint8, device=weight.device)
    all_blocks = weight.detach().reshape(num_blocks, BLOCK_SIZE)
    # A few blocks at a time: on the CPU the intermediates stay in its cache, on a card they stay small.
    num_at_a_time = _NUM_BLOCKS_AT_A_TIME[weight.device.type]
    for start in range(0, num_blocks, num_at_a_time):
        blocks = all_blocks[start : start + num_at_a_time].float()
        absmax = blocks.abs().amax(dim=1)
        scalers[start : start + len(blocks)] = absmax
        # A block of zeros is divided by 1, so that its codes are those of 0.
        blocks = blocks / torch.where(absmax == 0, 1.0, absmax).unsqueeze(1)
        codes = torch.bucketize(blocks, midpoints, out_int32=True).to(torch.uint8).view(-1, 2)
        packed_codes[start * BLOCK_SIZE // 2 :][: len(codes)] = codes[:, 0] << 4 | codes[:, 1]
    one, zero = torch.ones(1, device=weight.device), torch.zeros((), device=weight.device)
    stored_scalers = _quantized_scalers(scalers) if double else (scalers, one, zero)
    return from_stored_tensors([packed_codes, *stored_scalers], weight.shape, dtype)


def _scaler_block_size(num_blocks: int) -> int:
    """Return the size of the largest scaler blocks that divide the scalers."""
    return math.gcd(num_blocks, MAX_SCALER_BLOCK_SIZE)


def _quantized_scalers(scalers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the scalers: to int8 scalers, a factor per scaler block, and their mean."""
    scaler_block_size = _scaler_block_size(scalers.numel())
    mean = scalers.mean()
    centred = (scalers - mean).view(-1, scaler_block_size)
    absmax = centred.abs().amax(dim=1)
    factor = 128 / torch.where(absmax == 0, 1.0, absmax)
    quantized = (centred * factor.unsqueeze(1)).round().clamp(-128, 127).to(torch.int8)
    return quantized.flatten(), factor, mean


def stored_tensors(weight: Tensor) -> list[Tensor]:
    """List the tensors that hold a weight: an ordinary one itself, or the codes and scalers of an NF4 one."""
    if not isinstance(weight, NF4Tensor):
        return [weight]
    return [weight.quantized_data, weight.quantized_scalers, weight.quantization_factor, weight.scaler_mean]


def from_stored_tensors(tensors: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> NF4Tensor:
    """Rebuild a weight of this shape from its :func:`stored_tensors`; torchao dequantizes it to `dtype`."""
    packed_codes, quantized_scalers, quantization_factor, scaler_mean = tensors
    device = packed_codes.device
    return NF4Tensor(
        SubclassTensorArgs(shape, (shape[1], 1), 0, dtype, device, False),
        BLOCK_SIZE,
        shape.numel() // BLOCK_SIZE,
        quantized_scalers.numel() // quantization_factor.numel(),
        quantized_scalers,
        quantization_factor,
        scaler_mean,
        packed_codes,
        codebook(device, dtype),
    )


def empty(
    shape: torch.Size, dtype: torch.dtype, device: torch.device | None = None, *, double: bool = True
) -> NF4Tensor:
    """Allocate a weight of this shape without values, as `torch.empty` does."""
    num_blocks = shape.numel() // BLOCK_SIZE
    tensors = [
        torch.empty(shape.numel() // 2, dtype=torch.uint8, device=device),
        torch.empty(num_blocks, dtype=torch.int8 if double else torch.float32, device=device),
        torch.empty(num_blocks // _scaler_block_size(num_blocks) if double else 1, device=device),
        torch.empty((), device=device),
    ]
    return from_stored_tensors(tensors, shape, dtype)


def block_scalers(weight: NF4Tensor) -> Tensor:
    """Dequantize the scaler of every block of 64: (num_blocks,) in fp32."""
    scaler_blocks = weight.quantized_scalers.view(-1, weight.scaler_block_size)
    return (scaler_blocks / weight.quantization_factor.float().unsqueeze(1)).flatten() + weight.scaler_mean.float()


def dequantize(weight: NF4Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize a weight to an ordinary tensor of `dtype`, with bitsandbytes where it works, else with a table."""
    if bitsandbytes_dequantizes(weight.device.type):
        return dequantize_with_bitsandbytes(weight.quantized_data, block_scalers(weight), weight.shape, dtype)
    return dequantize_with_table(weight, dtype)


def dequantize_with_bitsandbytes(
    packed_codes: Tensor, scalers: Tensor, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    # note: given the real shape, the CPU's kernel assumes that each row begins a block, and is wrong for 96 columns.
    one_row = [1, 2 * packed_codes.numel()]
    codes = packed_codes.view(-1, 1)
    return torch.ops.bitsandbytes.dequantize_4bit(codes, scalers, BLOCK_SIZE, "nf4", one_row, dtype).view(shape)


def dequantize_with_table(weight: NF4Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize a weight with a table of the 256 pairs of codes that a byte can hold, on any device."""
    pairs = _pair_table(weight.device)[weight.quantized_data.int()]
    blocks = pairs.view(-1, weight.block_size) * block_scalers(weight).unsqueeze(1)
    return blocks.to(dtype).view(weight.shape)


@functools.cache
def codebook(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the value of each of the 16 codes, rounded to `dtype`: one tensor for all weights.

    A tensor made of Python numbers waits for the device to finish what it is doing, once for each 4-bit product.
    """
    with torch.inference_mode(False):  # or training could not use what answering made
        return torch.tensor(_CODEBOOK, device=device).to(dtype)


@functools.cache
def _pair_table(device: torch.device) -> Tensor:
    byte = torch.arange(256, device=device)
    return torch.stack([codebook(device)[byte >> 4], codebook(device)[byte & 15]], dim=1)


@torch.compiler.assume_constant_result
def bitsandbytes_dequantizes(device_type: str) -> bool:
    """Check whether bitsandbytes' operator exists and works on this kind of device."""
    return _bitsandbytes_works(device_type)


@functools.cache
def _bitsandbytes_works(device_type: str) -> bool:
    if import_bitsandbytes() is None:
        return False
    packed, scaler = torch.zeros(32, 1, dtype=torch.uint8, device=device_type), torch.ones(1, device=device_type)
    try:
        torch.ops.bitsandbytes.dequantize_4bit(packed, scaler, BLOCK_SIZE, "nf4", (1, 64), torch.float32)
    except (RuntimeError, AttributeError):
        return False
    return True
