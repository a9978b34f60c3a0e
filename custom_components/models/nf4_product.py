"""Products with frozen weights, quantized or dense, that keep no dequantized copy."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchao.dtypes.nf4tensor import NF4Tensor

from custom_components.models.nf4 import (
    BLOCK_SIZE,
    bitsandbytes_dequantizes,
    block_scalers,
    dequantize_with_bitsandbytes,
)
from custom_components.models.quantization import dequantize, from_stored_tensors, is_quantized, stored_tensors


class _FrozenProduct(torch.autograd.Function):
    """Computes `input @ weight.T` and keeps the quantized weight for the backward, never a dequantized copy.

    The weight is kept outside autograd, so that a recomputed layer does not repeat its last product.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        if not FROZEN_VALUES.are_needed:
            return input.new_empty(*input.shape[:-1], len(weight))
        return _product(input, weight, transposed=False)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return _product(grad_output, ctx.weight, transposed=True), None


class FrozenValues:
    """Whether anybody needs the values of frozen products, or only the gradients that go through them."""

    def __init__(self) -> None:
        self.are_needed = True

    @contextmanager
    def needed(self, are_needed: bool) -> Iterator[None]:
        """In the block, where they are not needed, leave the products out: their outputs are memory without values."""
        before, self.are_needed = self.are_needed, are_needed
        try:
            yield
        finally:
            self.are_needed = before


# One for the process, as forwards run one at a time.
FROZEN_VALUES = FrozenValues()


# Weights of a band. The CPU dequantizes and multiplies one band at a time, so that it stays in cache.
_NUM_WEIGHTS_OF_BAND = 2**22


class DenseWeightMemory:
    """The memory that the CPU's backward dequantizes every weight to, one after the other.

    Fresh memory for each weight would cost three times as much as the dequantizing: the system zeroes it page by page,
    and the gaps it leaves are not filled. For each dtype it is allocated with the first weight, grows to the largest,
    and lives until :meth:`release`, which a recipe calls after its last step.
    """

    def __init__(self) -> None:
        self._by_dtype: dict[torch.dtype, Tensor] = {}

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return a tensor without values, which the next one from here overwrites."""
        if dtype not in self._by_dtype or self._by_dtype[dtype].numel() < shape.numel():
            with torch.inference_mode(False):  # or training could not write to what answering allocated
                self._by_dtype[dtype] = torch.empty(shape.numel(), dtype=dtype)
        return self._by_dtype[dtype][: shape.numel()].view(shape)

    def release(self) -> None:
        """Free the memory; the next backward allocates it again."""
        self._by_dtype.clear()


# One for the process: backwards run one at a time, whatever the model.
DENSE_WEIGHT_MEMORY = DenseWeightMemory()


def _product(input: Tensor, weight: Tensor, *, transposed: bool) -> Tensor:
    """Compute `input @ weight.T`, or with `transposed` `input @ weight`; never a view."""
    if is_quantized(weight) and torch.compiler.is_compiling():
        return _opaque_product(input, stored_tensors(weight), list(weight.shape), transposed)
    if not isinstance(weight, NF4Tensor) or not _is_read_in_bands(weight):
        dense = dequantize(weight, input.dtype) if is_quantized(weight) else weight
        return input @ dense if transposed else F.linear(input, dense)
    if transposed:
        return input @ _dense_of_bands(weight, input.dtype)
    output = input.new_empty(*input.shape[:-1], len(weight))
    rows, output_rows = input.flatten(0, -2), output.flatten(0, -2)
    for band, dense_band in _dequantized_bands(weight, input.dtype):
        torch.mm(rows, dense_band.T, out=output_rows[:, band])
    return output


def _is_read_in_bands(weight: NF4Tensor) -> bool:
    return weight.device.type == "cpu" and weight.numel() > _NUM_WEIGHTS_OF_BAND and bitsandbytes_dequantizes("cpu")


def _dequantized_bands(weight: NF4Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of each band and their dequantized weights."""
    num_rows, num_columns = weight.shape
    num_rows_of_band = max(_NUM_WEIGHTS_OF_BAND // num_columns // BLOCK_SIZE, 1) * BLOCK_SIZE  # whole blocks
    scalers = block_scalers(weight)
    for start in range(0, num_rows, num_rows_of_band):
        band = slice(start, min(start + num_rows_of_band, num_rows))
        weights = slice(band.start * num_columns, band.stop * num_columns)
        codes = weight.quantized_data[weights.start // 2 : weights.stop // 2]
        band_scalers = scalers[weights.start // BLOCK_SIZE : weights.stop // BLOCK_SIZE]
        yield band, dequantize_with_bitsandbytes(codes, band_scalers, [-1, num_columns], dtype)


def _dense_of_bands(weight: NF4Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize a weight for a product that is computed before the next weight is dequantized."""
    dense = DENSE_WEIGHT_MEMORY.empty(weight.shape, dtype)
    for band, dense_band in _dequantized_bands(weight, dtype):
        dense[band] = dense_band
    return dense


# note: hidden from the compiler, which would keep the dequantized weight from the forward to the backward: 16 bits a
# weight for all layers.
@torch.library.custom_op("llama_lora_recipes::nf4_product", mutates_args=())
def _opaque_product(input: Tensor, stored: Sequence[Tensor], shape: Sequence[int], transposed: bool) -> Tensor:
    weight = from_stored_tensors(stored, torch.Size(shape), input.dtype)
    return _product(input, weight, transposed=transposed)


@_opaque_product.register_fake
def _(input: Tensor, stored: Sequence[Tensor], shape: Sequence[int], transposed: bool) -> Tensor:
    return input.new_empty(*input.shape[:-1], shape[1] if transposed else shape[0])


def frozen_product(input: Tensor, weight: Tensor) -> Tensor:
    """Compute `input @ weight.T` for an ordinary or a quantized weight, as a new tensor that may be changed in place.

    Args:
        input: (..., in_dim).
        weight: (out_dim, in_dim), frozen: it gets no gradient.
    """
    return _FrozenProduct.apply(input, weight)
