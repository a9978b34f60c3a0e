"""Training steps on one card: seconds, tokens per second, peak memory beside its estimate, in one table.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --shapes LLAMA2_7B --rows 4x1024 --minutes 8

Weights are random and made on the device, so that neither a checkpoint nor a network is needed. What does not fit the
card is a row that says so. Cases that would begin after --minutes are left out, and named.
"""

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torchtune.modules import RMSNorm, TransformerDecoder

from custom_components.config.lora_settings import LoRASettings
from custom_components.config.reading import load_settings
from custom_components.datasets.batching import Batch, collate
from custom_components.memory.estimate import MemoryEstimate, Recomputing, estimate_memory
from custom_components.models import nf4
from custom_components.models import shapes as llama_shapes
from custom_components.models.llama import lora_llama
from custom_components.models.lora import FrozenLinear
from custom_components.recipe_parts.step_choices import step_parts
from custom_components.runtime.devices import resolved_device, resolved_dtype
from custom_components.runtime.process_memory import PeakMemory
from custom_components.training.compiling import compiled_layers
from custom_components.training.gradients import ForwardOptions, accumulate_gradients, supervised_loss
from custom_components.training.loss import LinearCrossEntropy
from custom_components.training.optimizer import clip_gradients

ALL_ATTENTION = ("q_proj", "k_proj", "v_proj", "output_proj")
NUM_STEPS = 6
NUM_STEPS_NOT_COUNTED = 2  # the compiler's and the allocator's first


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    shape: str
    quantized: bool
    num_rows: int
    row_tokens: int
    recomputed: bool
    compiled: bool

    def __str__(self) -> str:
        base = "NF4" if self.quantized else "16 bits"
        flags = (["recomputed"] if self.recomputed else []) + (["compiled"] if self.compiled else [])
        return f"{self.shape} {base} {self.num_rows}x{self.row_tokens} {' '.join(flags)}".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--shapes", default="TINYLLAMA_1B,LLAMA2_7B,LLAMA2_13B", help="of custom_components.models.shapes"
    )
    parser.add_argument("--rows", default="2x512,4x1024", help="rows of a forward x tokens of a row, repeatable with ,")
    parser.add_argument("--compiled", default="off,on")
    parser.add_argument("--minutes", type=float, default=8)
    arguments = parser.parse_args()
    end_seconds = time.monotonic() + 60 * arguments.minutes
    device = resolved_device(arguments.device)
    dtype, dtype_words = resolved_dtype("auto", device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {dtype_words}; LoRA rank 16 on all linear layers, AdamW\n")
    print(
        "| case | s/step | tokens/s | peak GiB | estimated | estimate / peak |\n| --- | --- | --- | --- | --- | --- |"
    )
    left_out = []
    for case in cases(arguments.shapes.split(","), arguments.rows.split(","), arguments.compiled.split(",")):
        if time.monotonic() > end_seconds:
            left_out.append(str(case))
        else:
            print(measured_row(case, dtype, device), flush=True)
    if left_out:
        print(f"\nleft out after {arguments.minutes:g} minutes: {'; '.join(left_out)}")


def cases(shapes: list[str], rows: list[str], compiled: list[str]) -> Iterator[Case]:
    """The table's rows: NF4 with all choices, then the base in 16 bits."""
    sizes = [tuple(map(int, size.split("x"))) for size in rows]
    for shape in shapes:
        for (num_rows, row_tokens), recomputed, is_compiled in itertools.product(sizes, (False, True), compiled):
            yield Case(shape, True, num_rows, row_tokens, recomputed, is_compiled == "on")
    for shape in shapes:
        yield Case(shape, False, *sizes[0], recomputed=False, compiled=False)


def measured_row(case: Case, dtype: torch.dtype, device: torch.device) -> str:
    """A row of the table, for a model made for it and dropped after it."""
    try:
        seconds, peak_gib, estimate = measure(case, dtype, device)
    except torch.OutOfMemoryError:
        return f"| {case} | does not fit | | | | |"
    finally:
        gc.collect()
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    tokens_per_second = case.num_rows * case.row_tokens / seconds
    estimated_gib = estimate.peak_bytes(Recomputing(estimate.num_layers if case.recomputed else 0)) / 2**30
    return (
        f"| {case} | {seconds:.3f} | {tokens_per_second:,.0f} | {peak_gib:.2f} | {estimated_gib:.2f} | "
        f"{estimated_gib / peak_gib:.2f} |"
    )


def measure(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[float, float, MemoryEstimate]:
    """The median step's seconds, the peak of memory in GiB, and the estimate of it."""
    settings = load_settings(
        LoRASettings, ["--config", "configs/llama2_7b_qlora.yaml", f"quantize_base={str(case.quantized).lower()}"]
    )
    memory = PeakMemory(device)
    shape = getattr(llama_shapes, case.shape)
    with torch.device("meta"):
        model = lora_llama(shape, ALL_ATTENTION, True, lora_rank=16, lora_alpha=32, quantize_base=case.quantized)
    estimate = estimate_memory(model, step_parts(settings), dtype, device.type, [case.row_tokens] * case.num_rows)
    give_random_weights(model, dtype, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    batch = random_batch([case.row_tokens] * case.num_rows, shape.vocab_size)
    options = ForwardOptions(num_recomputed_layers=len(model.layers) if case.recomputed else 0)
    loss_of = supervised_loss(model.train(), LinearCrossEntropy(), options)
    step_seconds = []
    with compiled_layers(model, case.compiled, device, NUM_STEPS):
        for _ in range(NUM_STEPS):
            start_seconds = time.perf_counter()
            loss = accumulate_gradients([batch], loss_of, scaler, device)
            clip_gradients(optimizer, scaler, 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            assert loss.isfinite()  # note: waits for the device, so that the clock sees the step
            step_seconds.append(time.perf_counter() - start_seconds)
    peak_gib = memory.gib()
    assert peak_gib is not None
    return statistics.median(step_seconds[NUM_STEPS_NOT_COUNTED:]), peak_gib, estimate


def give_random_weights(model: TransformerDecoder, dtype: torch.dtype, device: torch.device) -> None:
    """Values for a model on the meta device, made on `device`, quantized where the model says so."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad or isinstance(module, RMSNorm):
                value = torch.ones(parameter.shape, device=device)
                value = value * 1e-3 if parameter.requires_grad else value
            else:
                value = torch.empty(parameter.shape, device=device, dtype=dtype).normal_(0, 0.02)
                if isinstance(module, FrozenLinear) and module.quantize_base:
                    value = nf4.quantize(value, dtype)
            setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
    model.to(device)  # what is left: rope's cache


def random_batch(lengths: Sequence[int], vocab_size: int) -> Batch:
    """Rows of these lengths, every token supervised."""
    rows = [torch.randint(3, vocab_size, (length,)).tolist() for length in lengths]
    return collate([{"tokens": row, "labels": row} for row in rows])


if __name__ == "__main__":
    main()
