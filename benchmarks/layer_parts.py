"""The parts of a layer that are not bare matrix products, forward and backward, beside other ways to compute them.

    python -m benchmarks.layer_parts --shape TINYLLAMA_1B --row-tokens 110 --num-rows 2

All in bf16, in turn, the median of some repeats: that is what is compared, since the machine may be shared.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
import torchtune.modules
from torch import Tensor
from torchao.dtypes.nf4tensor import linear_nf4

from benchmarks.matmul_floor import DTYPE
from custom_components.models import nf4, nf4_product
from custom_components.models import shapes as llama_shapes
from custom_components.models.attention import RowLengths, attend_within_rows
from custom_components.models.rms_norm import RMSNorm
from custom_components.models.rotary import RotaryPositions
from custom_components.models.shapes import LlamaShape
from custom_components.runtime.host_allocator import keep_freed_memory

NUM_REPEATS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="TINYLLAMA_1B", help="of custom_components.models.shapes")
    parser.add_argument("--row-tokens", type=int, default=110)
    parser.add_argument("--num-rows", type=int, default=2)
    arguments = parser.parse_args()
    shape = getattr(llama_shapes, arguments.shape)
    lengths = [arguments.row_tokens] * arguments.num_rows
    keep_freed_memory()  # as the recipe does
    print(f"{arguments.num_rows} rows of {arguments.row_tokens} tokens, milliseconds of forward and backward")
    for part in (attention, rotary_positions, norm, quantized_product):
        print(f"{part.__name__}: {', '.join(f'{name} {ms:.2f}' for name, ms in part(shape, lengths).items())}")


def attention(shape: LlamaShape, lengths: Sequence[int]) -> dict[str, float]:
    """Of all rows, causal."""
    num_tokens = sum(lengths)
    inputs = [
        torch.randn(1, num_tokens, num_heads, shape.head_dim, dtype=DTYPE).transpose(1, 2).requires_grad_()
        for num_heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    ]

    def with_torchs_kernel(*inputs: Tensor, dtype: torch.dtype) -> Tensor:
        rows = zip(*(tensor.to(dtype).split(lengths, dim=2) for tensor in inputs), strict=True)
        outputs = [F.scaled_dot_product_attention(*row, is_causal=True, enable_gqa=True) for row in rows]
        return torch.cat(outputs, dim=2).to(DTYPE)

    ways = {
        "ours": lambda *inputs: attend_within_rows(*inputs, RowLengths(tuple(lengths))),
        "torch in bf16": partial(with_torchs_kernel, dtype=DTYPE),
        "torch in fp32": partial(with_torchs_kernel, dtype=torch.float32),
    }
    return median_ms(ways, inputs)


def rotary_positions(shape: LlamaShape, lengths: Sequence[int]) -> dict[str, float]:
    """Of the queries."""
    heads = torch.randn(1, sum(lengths), shape.num_heads, shape.head_dim, dtype=DTYPE, requires_grad=True)
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    classes = {"ours": RotaryPositions, "torchtune": torchtune.modules.RotaryPositionalEmbeddings}
    return median_ms(
        {name: partial(kind(shape.head_dim, max(lengths)), input_pos=positions) for name, kind in classes.items()},
        [heads],
    )


def norm(shape: LlamaShape, lengths: Sequence[int]) -> dict[str, float]:
    """One of a layer's two, its scale frozen."""
    hidden = torch.randn(1, sum(lengths), shape.embed_dim, dtype=DTYPE, requires_grad=True)
    classes = {"ours": RMSNorm, "torchtune": torchtune.modules.RMSNorm}
    return median_ms({name: kind(shape.embed_dim).requires_grad_(False) for name, kind in classes.items()}, [hidden])


def quantized_product(shape: LlamaShape, lengths: Sequence[int]) -> dict[str, float]:
    """By the feed-forward's first weight."""
    weight = nf4.quantize(torch.randn(shape.intermediate_dim, shape.embed_dim), DTYPE)
    dense_weight = nf4.dequantize(weight, DTYPE)
    hidden = torch.randn(1, sum(lengths), shape.embed_dim, dtype=DTYPE, requires_grad=True)
    ways = {
        "ours": lambda input: nf4_product.frozen_product(input, weight),
        "torchao": lambda input: linear_nf4(input, weight),
        "in bf16": lambda input: F.linear(input, dense_weight),
    }
    return median_ms(ways, [hidden])


def median_ms(ways: dict[str, Callable[..., Tensor]], inputs: Sequence[Tensor]) -> dict[str, float]:
    """Milliseconds of each way's forward and backward, in turn, after one round that is not counted."""
    grad_output = torch.randn_like(next(iter(ways.values()))(*inputs))
    milliseconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + NUM_REPEATS):
        for name, way in ways.items():
            start_seconds = time.perf_counter()
            torch.autograd.grad(way(*inputs), inputs, grad_output)
            milliseconds[name].append(1e3 * (time.perf_counter() - start_seconds))
    return {name: statistics.median(values[1:]) for name, values in milliseconds.items()}


if __name__ == "__main__":
    main()
