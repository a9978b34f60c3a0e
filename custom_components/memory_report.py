"""An estimate of memory as tables for the terminal."""

import bisect
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Literal

from custom_components.memory_estimate import MemoryEstimate
from custom_components.simulated_step import StepMemory

_GIB = 2**30
# What the driver reports as the memory of each card, in GiB, less the CUDA context.
_CARDS_GIB = {
    "T4 16 GB": 14.2,
    "RTX 4090 24 GB": 23.1,
    "A100 40 GB": 38.9,
    "A100 80 GB": 78.7,
    "H100 80 GB": 78.6,
    "H200 141 GB": 139.3,
}
# What the allocator cannot use, because free pieces lie between used ones.
_USABLE_SHARE = 0.95
_MAX_ROW_TOKENS = 2**20


def memory_table(estimate: MemoryEstimate, device_type: str, checkpointing: bool | Literal["auto"]) -> str:
    """Parameters and bytes by kind, and the peak without and with all layers recomputed."""
    counts = ", ".join(f"{number:,} {kind}" for kind, number in estimate.num_parameters.items() if number)
    kinds = {
        "base": estimate.base_bytes,
        "adapters, fp32": estimate.adapter_bytes,
        "their gradients": estimate.gradient_bytes,
        "optimizer state": estimate.optimizer_bytes,
        "activations and loss": estimate.step.peak_bytes(estimate.num_layers, 0),
        "  the same, all layers recomputed": estimate.step.peak_bytes(estimate.num_layers, estimate.num_layers),
        f"libraries on {device_type}": estimate.overhead_bytes,
    }
    peaks = {
        "peak": estimate.peak_bytes(0),
        "peak, all layers recomputed": estimate.peak_bytes(estimate.num_layers),
    }
    marked = "peak, all layers recomputed" if checkpointing is True else "peak"
    lines = [f"parameters: {counts}", f"{'':38}{'GiB':>8}"]
    lines += [f"{kind:38}{num_bytes / _GIB:8.2f}" for kind, num_bytes in kinds.items()]
    lines += [
        f"{kind:38}{num_bytes / _GIB:8.2f}" + ("  <- this config" if kind == marked and checkpointing != "auto" else "")
        for kind, num_bytes in peaks.items()
    ]
    return "\n".join(lines)


def card_table(
    half_a_row: MemoryEstimate,
    one_row: MemoryEstimate,
    row_tokens: int,
    batch_size: int,
    checkpointing: bool | Literal["auto"],
) -> str:
    """Which cards the run fits, and the largest batch and the longest row that they hold.

    Args:
        half_a_row, one_row: estimates for CUDA of a forward of row_tokens // 2 and of row_tokens; memory is a straight
            line in tokens.
    """

    def estimate_of(num_tokens: int) -> MemoryEstimate:
        return replace(one_row, step=_at_tokens(half_a_row.step, one_row.step, row_tokens // 2, row_tokens, num_tokens))

    lines = [f"{'card':16}{'this config':24}{'largest batch':>15}{'longest row, batch 1':>22}"]
    for card, card_gib in _CARDS_GIB.items():
        usable_bytes = int(_USABLE_SHARE * card_gib * _GIB)
        largest_tokens = _largest_forward_tokens(estimate_of, usable_bytes)
        verdict = _verdict(estimate_of(batch_size * row_tokens), usable_bytes, checkpointing)
        lines.append(f"{card:16}{verdict:24}{largest_tokens // row_tokens:15,}{largest_tokens:22,}")
    lines.append(f"largest batch of rows of {row_tokens} tokens, and longest row: with all layers recomputed")
    return "\n".join(lines)


def _verdict(estimate: MemoryEstimate, usable_bytes: int, checkpointing: bool | Literal["auto"]) -> str:
    if checkpointing != "auto":
        num_recomputed_layers = estimate.num_layers if checkpointing else 0
        return "fits" if estimate.peak_bytes(num_recomputed_layers) <= usable_bytes else "does not fit"
    fewest = estimate.num_recomputed_layers(usable_bytes)
    if fewest is None:
        return "does not fit"
    return f"fits, {fewest} of {estimate.num_layers} recomputed" if fewest else "fits"


def _largest_forward_tokens(estimate_of: Callable[[int], MemoryEstimate], usable_bytes: int) -> int:
    """The most tokens of a forward that fit with all layers recomputed; 0 if none do."""

    def is_too_large(num_tokens: int) -> bool:
        estimate = estimate_of(num_tokens)
        return estimate.peak_bytes(estimate.num_layers) > usable_bytes

    return bisect.bisect_left(range(1, _MAX_ROW_TOKENS), True, key=is_too_large)


def _at_tokens(low: StepMemory, high: StepMemory, low_tokens: int, high_tokens: int, num_tokens: int) -> StepMemory:
    """The point of a straight line through two."""
    share = (num_tokens - low_tokens) / (high_tokens - low_tokens)
    values = {
        field.name: round(getattr(low, field.name) + share * (getattr(high, field.name) - getattr(low, field.name)))
        for field in fields(StepMemory)
    }
    return StepMemory(**values)
