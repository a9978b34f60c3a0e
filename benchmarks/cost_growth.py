"""How a step's time and memory grow with its tokens, packed and not, in one table.

    python -m benchmarks.cost_growth --shape TINYLLAMA_1B --num-layers 4

One forward of rows of --row-tokens each, and one of a single row as long as all of them, on the model's first layers.
Time should be a straight line in tokens but for attention, whose share grows with the length of a row.
"""

import argparse
import dataclasses
import statistics
import time

import torch

from benchmarks.gpu import ALL_ATTENTION, give_random_weights, random_batch
from custom_components.models import shapes as llama_shapes
from custom_components.models.llama import lora_llama
from custom_components.runtime.devices import resolved_device, resolved_dtype
from custom_components.runtime.host_allocator import keep_freed_memory, return_freed_memory
from custom_components.runtime.process_memory import PeakMemory
from custom_components.training.gradients import accumulate_gradients, supervised_loss
from custom_components.training.loss import LinearCrossEntropy

STEP_TOKENS = (128, 256, 512, 1024, 2048, 4096)
NUM_STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="TINYLLAMA_1B", help="of custom_components.models.shapes")
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--row-tokens", type=int, default=128)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = resolved_device(arguments.device)
    dtype, _ = resolved_dtype("auto", device)
    if device.type == "cpu":
        keep_freed_memory()
    shape = getattr(llama_shapes, arguments.shape)
    shape = dataclasses.replace(shape, num_layers=arguments.num_layers, max_seq_len=max(STEP_TOKENS))
    with torch.device("meta"):
        model = lora_llama(shape, ALL_ATTENTION, True, lora_rank=8, lora_alpha=16, quantize_base=True)
    give_random_weights(model, dtype, device)
    print(f"| tokens | rows of {arguments.row_tokens}: s | ms/token | GiB | one row: s | ms/token | GiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for num_tokens in STEP_TOKENS:
        columns = []
        for lengths in ([arguments.row_tokens] * (num_tokens // arguments.row_tokens), [num_tokens]):
            seconds, growth_gib = measured_step(model, lengths, shape.vocab_size, device)
            columns += [f"{seconds:.2f}", f"{1e3 * seconds / num_tokens:.2f}", f"{growth_gib:.2f}"]
        print(f"| {num_tokens} | {' | '.join(columns)} |", flush=True)


def measured_step(
    model: torch.nn.Module, lengths: list[int], vocab_size: int, device: torch.device
) -> tuple[float, float]:
    """The median seconds of a forward and backward over rows of these lengths, and the memory they add, in GiB."""
    batch = random_batch(lengths, vocab_size)
    bytes_before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return_freed_memory()
    memory = PeakMemory(device)
    step_seconds = []
    for _ in range(NUM_STEPS):
        start_seconds = time.perf_counter()
        no_scaler = torch.amp.GradScaler(device.type, enabled=False)
        loss = accumulate_gradients([batch], supervised_loss(model.train(), LinearCrossEntropy()), no_scaler, device)
        assert loss.isfinite()
        model.zero_grad(set_to_none=True)
        step_seconds.append(time.perf_counter() - start_seconds)
    peak_gib = memory.gib()
    assert peak_gib is not None
    return statistics.median(step_seconds), peak_gib - bytes_before / 2**30


if __name__ == "__main__":
    main()
