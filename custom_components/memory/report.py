"""An estimate of memory as tables for the terminal."""

import bisect
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch

from custom_components.memory.estimate import AvailableBytes, MemoryEstimate, Recomputing
from custom_components.memory.fitting import StepChoices
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
_MAX_ROW_TOKENS = 2**23
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
        "peak": estimate.peak_bytes(Recomputing()),
        "peak, all layers recomputed": estimate.peak_bytes(estimate.all_recomputed),
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

    def largest_forward_tokens(self, usable_bytes: int, *, offloads_inputs: bool = False) -> int:
        """Find the most tokens of a forward that fit with all layers recomputed; 0 if none do."""
        recomputing = Recomputing(self.estimate.num_layers, offloads_inputs)

        def is_too_large(num_tokens: int) -> bool:
            return self.at(num_tokens).peak_bytes(recomputing) > usable_bytes

        return bisect.bisect_left(range(1, _MAX_ROW_TOKENS), True, key=is_too_large)

    def offloaded_bytes(self, num_tokens: int) -> int:
        """Compute the host's memory that the inputs of all layers take."""
        return self.at(num_tokens).offloaded_bytes


def usable_card_bytes(card: str) -> int:
    return int(USABLE_CARD_SHARE * CARDS_GIB[card] * _GIB)


def card_table(this_config: MemoryEstimate, line: MemoryLine, choices: StepChoices) -> str:
    """Tabulate which cards the run fits, and the largest forward that fits them.

    Args:
        this_config: the estimate for CUDA of the config's own forward.
        choices: what the config says of recomputing.
    """
    lines = [
        f"{'':40}{'largest forward, in tokens':>26}",
        f"{'card':16}{'this config':26}recomputed  offloaded  host GiB",
    ]
    for card in CARDS_GIB:
        usable_bytes = usable_card_bytes(card)
        recomputed, offloaded = (
            line.largest_forward_tokens(usable_bytes, offloads_inputs=is_so) for is_so in (False, True)
        )
        host_gib = line.offloaded_bytes(offloaded) / _GIB
        verdict = card_verdict(this_config, usable_bytes, choices)
        lines.append(f"{card:16}{verdict:26}{recomputed:10,}{offloaded:11,}{host_gib:10.1f}")
    lines.append(
        "recomputed: all layers are; offloaded: and their inputs wait in the host's\n"
        "memory, which then takes so much; divide by the length of rows for a batch size"
    )
    return "\n".join(lines)


def card_verdict(estimate: MemoryEstimate, usable_bytes: int, choices: StepChoices) -> str:
    """Say whether a run fits a card, and how, if the host has the memory for what is offloaded."""
    recomputing = way_on_card(estimate, usable_bytes, choices)
    if recomputing is None:
        return "does not fit"
    if recomputing.offloads_inputs:
        return f"fits, {estimate.offloaded_bytes / _GIB:.1f} GiB offloaded"
    if recomputing.num_layers and choices.recomputes == "auto":
        return f"fits, {recomputing.num_layers} of {estimate.num_layers} recomputed"
    return "fits"


def way_on_card(estimate: MemoryEstimate, usable_bytes: int, choices: StepChoices) -> Recomputing | None:
    """Find what is recomputed on a card; None if the run does not fit it."""
    ladder = choices.ladder(estimate.num_layers, torch.device("cuda"))
    return estimate.fastest_fitting(ladder, AvailableBytes(usable_bytes, of_host=estimate.offloaded_bytes))
