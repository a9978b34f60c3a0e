"""The least time an optimizer step can take: its bare matrix products and its dequantizing, timed here and now.

    python -m benchmarks.matmul_floor --checkpoint-dir checkpoints/random-1b --step 442:330
    python -m benchmarks.matmul_floor --checkpoint-dir checkpoints/random-1b --step 302:217,262:180 --checkpointing

A step is its forwards, each as TOKENS:SUPERVISED, without padding. Counted are, in bf16, the product with every frozen
linear weight, the product for the gradient of its input, and both for the output head on supervised positions; with
checkpointing the layers' forward products once more, but for the last of each, of which the backward needs nothing. A
forward and its backward dequantize every NF4 weight twice, with checkpointing all but those three times. Neither
attention, norms, adapters and loss nor the first layer's needless input gradient are accounted for. One layer's weights
are measured, more than a processor's caches hold in the shapes of real models, and multiplied by the number of layers.

Dimensions: `T` tokens, `I` in_dim, `O` out_dim.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from custom_components.models import nf4
from custom_components.models.shapes import LlamaShape, shape_from_checkpoint
from custom_components.runtime.errors import run_recipe
from custom_components.runtime.host_allocator import keep_freed_memory

DTYPE = torch.bfloat16
NUM_REPEATS = 5


@dataclass(frozen=True)
class StepFloor:
    """Seconds of one optimizer step."""

    matmul_seconds: float
    dequantize_seconds: float

    @property
    def seconds(self) -> float:
        return self.matmul_seconds + self.dequantize_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint-dir", type=Path, required=True, help="its config.json is all that is read")
    parser.add_argument(
        "--step", type=step_sizes, action="append", required=True, metavar="TOKENS:SUPERVISED,...", help="repeatable"
    )
    parser.add_argument("--checkpointing", action="store_true", help="the layers are computed again in the backward")
    parser.add_argument("--json", action="store_true", help="print the steps as a JSON list, for other programs")
    arguments = parser.parse_args()
    shape = shape_from_checkpoint(arguments.checkpoint_dir)
    floors = step_floors(shape, arguments.step, checkpointing=arguments.checkpointing)
    if arguments.json:
        print(json.dumps([asdict(floor) for floor in floors]))
        return
    for sizes, floor in zip(arguments.step, floors, strict=True):
        num_tokens = sum(num_tokens for num_tokens, _ in sizes)
        print(
            f"{len(sizes)} forwards of {num_tokens} tokens in all: products {floor.matmul_seconds:.3f} s, "
            f"dequantizing {floor.dequantize_seconds:.3f} s, together {floor.seconds:.3f} s"
        )


def step_sizes(text: str) -> list[tuple[int, int]]:
    """`442:330,300:210` as [(442, 330), (300, 210)]."""
    try:
        pairs = [forward.split(":") for forward in text.split(",")]
        return [(int(num_tokens), int(num_supervised)) for num_tokens, num_supervised in pairs]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 442:330 or 302:217,262:180") from None


def step_floors(
    shape: LlamaShape, steps: Sequence[Sequence[tuple[int, int]]], *, checkpointing: bool
) -> list[StepFloor]:
    """The floor of each step, given the (unpadded, supervised) tokens of each of its forwards."""
    keep_freed_memory()  # as the recipe does
    weights_OI = [torch.empty(size, dtype=DTYPE).normal_(0, 0.02) for size in linear_sizes(shape)]
    head_OI = torch.empty(shape.vocab_size, shape.embed_dim, dtype=DTYPE).normal_(0, 0.02)
    # What a layer computes again ends before its last product, which the backward does not need.
    recomputed_OI = weights_OI[:-1] if checkpointing else []
    dequantized_OI = [*weights_OI, *weights_OI, *recomputed_OI]
    quantized = [nf4.quantize(weight_OI, DTYPE) for weight_OI in dequantized_OI if nf4.can_quantize(weight_OI.shape)]
    dequantize_seconds = shape.num_layers * median_seconds(
        lambda: [nf4.dequantize(weight, DTYPE) for weight in quantized]
    )

    def forward_floor(num_tokens: int, num_supervised: int) -> float:
        layer_forward, layer_backward = product_seconds(weights_OI, num_tokens)
        recomputed_forward, _ = product_seconds(recomputed_OI, num_tokens)
        head_forward, head_backward = product_seconds([head_OI], num_supervised)
        layer_seconds = layer_forward + recomputed_forward + layer_backward
        return shape.num_layers * layer_seconds + head_forward + head_backward

    return [
        StepFloor(
            matmul_seconds=sum(forward_floor(*sizes) for sizes in step),
            dequantize_seconds=len(step) * dequantize_seconds,
        )
        for step in steps
    ]


def linear_sizes(shape: LlamaShape) -> list[tuple[int, int]]:
    """(out_dim, in_dim) of the linear weights of one layer."""
    dim, kv_dim, intermediate_dim = shape.embed_dim, shape.num_kv_heads * shape.head_dim, shape.intermediate_dim
    attention = [(dim, dim), (kv_dim, dim), (kv_dim, dim), (dim, dim)]
    return [*attention, (intermediate_dim, dim), (intermediate_dim, dim), (dim, intermediate_dim)]


def product_seconds(weights_OI: Sequence[Tensor], num_tokens: int) -> tuple[float, float]:
    """Of all the weights: the forward products and those for the gradients of the inputs."""
    inputs = {dim: torch.randn(num_tokens, dim).to(DTYPE) for weight_OI in weights_OI for dim in weight_OI.shape}
    return (
        median_seconds(lambda: [F.linear(inputs[weight_OI.shape[1]], weight_OI) for weight_OI in weights_OI]),
        median_seconds(lambda: [inputs[weight_OI.shape[0]] @ weight_OI for weight_OI in weights_OI]),
    )


def median_seconds(function: Callable[[], object]) -> float:
    """Of some calls, after one that is not counted."""
    function()
    seconds = []
    for _ in range(NUM_REPEATS):
        start_seconds = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start_seconds)
    return statistics.median(seconds)


if __name__ == "__main__":
    run_recipe(main)
