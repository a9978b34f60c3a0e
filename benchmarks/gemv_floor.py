"""The least time a token of an answer can take: the bare 4-bit products of all linear weights, and the head's.

    python -m benchmarks.gemv_floor --checkpoint-dir checkpoints/random-1b

Every weight of every layer is there, so that none is found in a processor's cache; only their sizes are real. The
products are bitsandbytes' `gemv_4bit`, the head's is in bf16. Attention, norms and adapters are not accounted for.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.matmul_floor import DTYPE, linear_sizes
from custom_components.models import nf4
from custom_components.models.shapes import LlamaShape, shape_from_checkpoint
from custom_components.runtime.errors import run_recipe
from custom_components.runtime.quiet_bitsandbytes import import_bitsandbytes

NUM_TOKENS = 20


@dataclass(frozen=True)
class TokenFloor:
    """Milliseconds of one token."""

    gemv_ms: float
    head_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint-dir", type=Path, required=True, help="its config.json is all that is read")
    parser.add_argument("--json", action="store_true", help="print a JSON object, for other programs")
    arguments = parser.parse_args()
    floor = token_floor(shape_from_checkpoint(arguments.checkpoint_dir))
    if arguments.json:
        print(json.dumps(asdict(floor)))
    else:
        print(f"4-bit products {floor.gemv_ms:.1f} ms, head {floor.head_ms:.1f} ms a token")


@torch.inference_mode()
def token_floor(shape: LlamaShape) -> TokenFloor:
    """The medians over some tokens."""
    import_bitsandbytes()
    sizes = linear_sizes(shape) * shape.num_layers
    weights = [
        (torch.full((out_dim, in_dim // 2), 0x5A, dtype=torch.uint8), scalers(out_dim, in_dim), (out_dim, in_dim))
        for out_dim, in_dim in sizes
    ]
    inputs = {in_dim: torch.randn(1, in_dim).to(DTYPE) for _, in_dim in sizes}
    codebook = nf4.codebook(torch.device("cpu"))
    head = torch.zeros(shape.vocab_size, shape.embed_dim, dtype=DTYPE).fill_(0.01)
    gemv_seconds, head_seconds = [], []
    for _ in range(NUM_TOKENS):
        start_seconds = time.perf_counter()
        for codes, absmax, (out_dim, in_dim) in weights:
            torch.ops.bitsandbytes.gemv_4bit(inputs[in_dim], codes, (out_dim, in_dim), absmax, codebook, nf4.BLOCK_SIZE)
        products_done_seconds = time.perf_counter()
        F.linear(inputs[shape.embed_dim], head)
        gemv_seconds.append(products_done_seconds - start_seconds)
        head_seconds.append(time.perf_counter() - products_done_seconds)
    return TokenFloor(1000 * statistics.median(gemv_seconds), 1000 * statistics.median(head_seconds))


def scalers(out_dim: int, in_dim: int) -> Tensor:
    """In the layout of bitsandbytes' CPU kernel, which takes them in bf16."""
    return torch.full((in_dim // nf4.BLOCK_SIZE, out_dim), 0.01, dtype=DTYPE)


if __name__ == "__main__":
    run_recipe(main)
