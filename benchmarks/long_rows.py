"""Rows as long as memory allows: the tokens that fit each card, by estimate, and bytes a token measured on the CPU.

    python -m benchmarks.long_rows --tokens 4096 16384

The estimate is for QLoRA of Llama 3.1 8B's shape: rank 32 on all linear layers, one row, no dropout, AdamW. Beside it
stand the tokens that Unsloth publishes for this (github.com/unslothai/unsloth, README.md, "Llama 3.1 (8B) max. context
length"), for itself and for Hugging Face with flash attention 2.

What is measured is a forward and backward of two layers of Llama 2 7B's widths over one row, every token supervised.
The inputs of layers are handed to :class:`CountedInputs`, which stands for the host's memory; the rest is what the
process's anonymous memory grew by. Each row has a process of its own, which gives freed memory back to the system
at once: what a heap loses in gaps is another matter, and no card's.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu import ALL_ATTENTION, give_random_weights, random_batch
from custom_components.memory.estimate import MemoryEstimate, StepParts, estimate_memory
from custom_components.memory.report import MANY_TOKENS, MemoryLine, usable_card_bytes
from custom_components.models.llama import lora_llama
from custom_components.models.shapes import LLAMA2_7B, LLAMA3_1_8B, LlamaShape
from custom_components.runtime.process_memory import PeakMemory
from custom_components.training.gradients import ForwardOptions, accumulate_gradients, supervised_loss
from custom_components.training.loss import LinearCrossEntropy

# Unsloth's, and Hugging Face's with flash attention 2.
PUBLISHED_TOKENS = {
    "T4 16 GB": (40_724, 2_551),
    "RTX 4090 24 GB": (78_475, 5_789),
    "A100 40 GB": (153_977, 12_264),
    "A100 80 GB": (342_733, 28_454),
}
NUM_MEASURED_LAYERS = 2
CPU = torch.device("cpu")


class CountedInputs:
    """Keeps layers' inputs and counts the most bytes of them at a time, in the place of the host's memory."""

    def __init__(self) -> None:
        self._num_bytes = self.peak_bytes = 0

    def put(self, input_1TD: Tensor) -> Tensor:
        self._num_bytes += input_1TD.nbytes
        self.peak_bytes = max(self.peak_bytes, self._num_bytes)
        return input_1TD

    def take(self, kept: Tensor) -> Tensor:
        self._num_bytes -= kept.nbytes
        return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[], help="of the rows that are measured")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(*measured(arguments.measure))
        return
    print(cards_table())
    if arguments.tokens:
        print(f"\n{measured_table(arguments.tokens)}")


def cards_table() -> str:
    """Tabulate the tokens that fit, and the published ones."""
    line = MemoryLine(2 * MANY_TOKENS, *(estimate_of(LLAMA3_1_8B, 32, n * MANY_TOKENS, "cuda") for n in (2, 4)))
    rows = [
        "| card | ours, recomputed | ours, offloaded | GiB of the host | Unsloth | Hugging Face | ours / Unsloth |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for card, (unsloth, hugging_face) in PUBLISHED_TOKENS.items():
        recomputed, offloaded = (
            line.largest_forward_tokens(usable_card_bytes(card), offloads_inputs=offloads) for offloads in (False, True)
        )
        host_gib = line.offloaded_bytes(offloaded) / 2**30
        rows.append(
            f"| {card} | {recomputed:,} | {offloaded:,} | {host_gib:.1f} | {unsloth:,} | {hugging_face:,} | "
            f"{offloaded / unsloth:.2f} |"
        )
    return "\n".join(rows)


def estimate_of(shape: LlamaShape, rank: int, num_tokens: int, device_type: str) -> MemoryEstimate:
    """Estimate QLoRA over one row, every token supervised."""
    with torch.device("meta"):
        model = lora_llama(shape, ALL_ATTENTION, True, lora_rank=rank, lora_alpha=rank, quantize_base=True)
    parts = StepParts(LinearCrossEntropy(), partial(torch.optim.AdamW, lr=1e-4), None, False, False)
    return estimate_memory(model, parts, torch.bfloat16, device_type, [num_tokens])


def measured_table(rows_tokens: Sequence[int]) -> str:
    """Tabulate measured and estimated bytes a token of a step, without what waits in the host's memory."""
    shape = measured_shape(max(rows_tokens))
    table = [
        "| tokens of the row | seconds | measured GiB | estimated GiB | estimate / measured | handed over, GiB |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for num_tokens in rows_tokens:
        command = [sys.executable, "-m", "benchmarks.long_rows", "--measure", str(num_tokens)]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
        words = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()
        seconds, peak_bytes, handed_over_bytes = map(float, words)
        step = estimate_of(shape, 32, num_tokens, "cpu").step
        kept_bytes = NUM_MEASURED_LAYERS * step.layer_input_bytes
        estimated = step.peak_bytes(NUM_MEASURED_LAYERS, NUM_MEASURED_LAYERS) - kept_bytes
        measured_bytes = peak_bytes - handed_over_bytes
        table.append(
            f"| {num_tokens:,} | {seconds:.0f} | {measured_bytes / 2**30:.2f} | {estimated / 2**30:.2f} | "
            f"{estimated / measured_bytes:.2f} | {handed_over_bytes / 2**30:.2f} |"
        )
    return "\n".join(table)


def measured_shape(num_tokens: int) -> LlamaShape:
    return replace(LLAMA2_7B, num_layers=NUM_MEASURED_LAYERS, max_seq_len=num_tokens)


def measured(num_tokens: int) -> tuple[float, int, int]:
    """Run a forward and backward; return its seconds, the growth of the process, and the bytes handed over."""
    shape = measured_shape(num_tokens)
    with torch.device("meta"):
        model = lora_llama(shape, ALL_ATTENTION, True, lora_rank=32, lora_alpha=32, quantize_base=True)
    give_random_weights(model, torch.bfloat16, CPU)
    inputs = CountedInputs()
    options = ForwardOptions(NUM_MEASURED_LAYERS, layer_inputs=inputs)
    loss_of = supervised_loss(model.train(), LinearCrossEntropy(), options)
    no_scaler = torch.amp.GradScaler("cpu", enabled=False)
    # What the libraries take with the first product is not the row's.
    accumulate_gradients([random_batch([64], shape.vocab_size)], loss_of, no_scaler, CPU)
    batch = random_batch([num_tokens], shape.vocab_size)
    memory, start_seconds = PeakMemory(CPU), time.perf_counter()
    accumulate_gradients([batch], loss_of, no_scaler, CPU)
    seconds = time.perf_counter() - start_seconds
    peak_gib = memory.gib()
    assert peak_gib is not None
    return seconds, round(peak_gib * 2**30), inputs.peak_bytes


if __name__ == "__main__":
    main()
