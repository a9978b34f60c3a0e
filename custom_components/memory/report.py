"""An estimate of memory as tables for the terminal."""

import bisect
from dataclasses import dataclass, fields, replace
from typing import Literal

from custom_components.memory.estimate import MemoryEstimate
from custom_components.memory.simulated_step import StepMemory

_GIB = 2**30
# The memory of each card as its driver reports it, in GiB, less the CUDA context.
CARDS_GIB = {
    "T4 16 GB": 14.2,
    "RTX 4090 24 GB": 23.1,
    "A100 40 GB": 38.9,
    "A100 80 GB": 78.7,
    "H100 80 GB": 78.6,
    "H200 141 GB": 139.3,
}
# Usable share of a card; fragmentation takes the rest.
USABLE_CARD_SHARE = 0.95
_MAX_ROW_TOKENS = 2**20
# Tokens per forward above which memory grows linearly.
MANY_TOKENS = 8192


def memory_table(estimate: MemoryEstimate, device_type: str, checkpointing: bool | Literal["auto"]) -> str:
    """Tabulate parameters and bytes by kind, and the peak with no layer and with all layers recomputed."""
    counts = ", ".join(f"{number:,} {kind}" for kind, number in estimate.num_parameters.items() if number)
    kinds = {
        "base": estimate.base_bytes,
        ("adapters, fp32" if estimate.trains_adapter else "trained weights"): estimate.trained_bytes,
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


@dataclass(frozen=True)
class MemoryLine:
    """Memory as a linear function of a forward's tokens, through an estimate and one for twice the tokens.

    Smaller forwards are off the line: the loss does not fill a chunk, and adapters' gradients outweigh activations.
    """

    num_tokens: int
    estimate: MemoryEstimate
    estimate_of_twice: MemoryEstimate

    def at(self, num_tokens: int) -> MemoryEstimate:
        share = num_tokens / self.num_tokens - 1
        values = {
            field.name: round(
                (1 - share) * getattr(self.estimate.step, field.name)
                + share * getattr(self.estimate_of_twice.step, field.name)
            )
            for field in fields(StepMemory)
        }
        return replace(self.estimate, step=StepMemory(**values))

    def largest_forward_tokens(self, usable_bytes: int) -> int:
        """Find the most tokens of a forward that fit with all layers recomputed; 0 if none do."""

        def is_too_large(num_tokens: int) -> bool:
            estimate = self.at(num_tokens)
            return estimate.peak_bytes(estimate.num_layers) > usable_bytes

        return bisect.bisect_left(range(1, _MAX_ROW_TOKENS), True, key=is_too_large)


def card_table(
    this_config: MemoryEstimate, line: MemoryLine, row_tokens: int, checkpointing: bool | Literal["auto"]
) -> str:
    """Tabulate which cards the run fits, and the largest forward that fits them.

    Args:
        this_config: the estimate for CUDA of the config's own forward.
    """
    lines = [f"{'card':16}{'this config':24}{'largest batch':>15}{'tokens of a forward':>22}"]
    for card, card_gib in CARDS_GIB.items():
        usable_bytes = int(USABLE_CARD_SHARE * card_gib * _GIB)
        largest_tokens = line.largest_forward_tokens(usable_bytes)
        verdict = card_verdict(this_config, usable_bytes, checkpointing)
        lines.append(f"{card:16}{verdict:24}{largest_tokens // row_tokens:15,}{largest_tokens:22,}")
    lines.append(f"largest batch (rows of {row_tokens} tokens), tokens of a forward: all layers recomputed")
    return "\n".join(lines)


def card_verdict(estimate: MemoryEstimate, usable_bytes: int, checkpointing: bool | Literal["auto"]) -> str:
    if checkpointing != "auto":
        num_recomputed_layers = estimate.num_layers if checkpointing else 0
        return "fits" if estimate.peak_bytes(num_recomputed_layers) <= usable_bytes else "does not fit"
    fewest = estimate.num_recomputed_layers(usable_bytes)
    if fewest is None:
        return "does not fit"
    return f"fits, {fewest} of {estimate.num_layers} recomputed" if fewest else "fits"
