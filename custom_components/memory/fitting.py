"""Choice of the rows of a forward and of recomputed layers, so that a run fits its device: `auto` in the config."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest
from typing import Literal

import torch
from torchtune.modules import TransformerDecoder

from custom_components.datasets.batching import collate
from custom_components.memory.estimate import (
    AvailableBytes,
    Recomputing,
    StepParts,
    estimate_memory,
    optimizer_bytes,
)
from custom_components.models.hidden_states import num_layers_with_backward
from custom_components.models.trained import gradients_freed
from custom_components.runtime.out_of_memory import is_out_of_memory
from custom_components.runtime.process_memory import usable_bytes
from custom_components.runtime.terminal import say
from custom_components.training.gradients import ForwardOptions, accumulate_gradients, supervised_loss

# A weight is dequantized once per forward; beyond this many tokens a fuller forward saves too little of that.
_ENOUGH_FORWARD_TOKENS = 16_384


@dataclass(frozen=True)
class StepChoices:
    """What a config says of how a step is computed; "auto" leaves the choice open.

    Attributes:
        batch_size: rows of a forward; with packs, packs.
        gradient_accumulation_steps: forwards of an optimizer step; its rows, where `batch_size` is left open.
        recomputes: whether the layers that have a backward keep only their input for it.
        offloads_inputs: whether these inputs wait in the host's memory, which only CUDA has of its own.
    """

    batch_size: int | Literal["auto"]
    gradient_accumulation_steps: int
    recomputes: bool | Literal["auto"]
    offloads_inputs: bool | Literal["auto"] = "auto"

    def ladder(self, num_layers: int, device: torch.device) -> list[Recomputing]:
        """List the ways to recompute that the config allows on a device, from the fastest to that of least memory."""
        offloaded = Recomputing(num_layers, offloads_inputs=True)
        if self.offloads_inputs is True:
            return [offloaded]
        if self.recomputes is False:
            return [Recomputing()]
        numbers = range(num_layers + 1) if self.recomputes == "auto" else [num_layers]
        may_offload = self.offloads_inputs == "auto" and device.type == "cuda"
        return [*map(Recomputing, numbers), *([offloaded] if may_offload else [])]


@dataclass(frozen=True)
class StepRows:
    """The rows that forwards are made of.

    Attributes:
        lengths: in tokens.
        num_dialogs: of a row.
        pack_capacity_tokens: the tokens of a pack; None: rows are not packed.
    """

    lengths: Sequence[int]
    num_dialogs: int = 1
    pack_capacity_tokens: int | None = None

    def largest_forward(self, batch_size: int) -> tuple[int, ...]:
        """Return the lengths of the dialogs in the largest possible forward; a pack counts as one row.

        Of a row with several dialogs they are taken to be of one length.
        """
        if self.pack_capacity_tokens is None:
            rows = nlargest(batch_size, self.lengths)
        else:
            rows = [self.pack_capacity_tokens] * batch_size
        num_dialogs = self.num_dialogs
        return tuple((length + index) // num_dialogs for length in rows for index in range(num_dialogs))


@dataclass(frozen=True)
class Fit:
    """How a step is divided into forwards, and what is recomputed.

    Attributes:
        batch_size: rows of a forward; with packs, packs.
        gradient_accumulation_steps: forwards of an optimizer step.
        recomputing: what the backward computes again.
        words: the reason for the choice; empty if the config left nothing to choose.
    """

    batch_size: int
    gradient_accumulation_steps: int
    recomputing: Recomputing = Recomputing()
    words: str = ""


def fit_to_device(
    choices: StepChoices,
    model: TransformerDecoder,
    rows: StepRows,
    parts: StepParts,
    dtype: torch.dtype,
    device: torch.device,
) -> Fit:
    """Choose what the config leaves open on this device.

    With a batch size of "auto", `gradient_accumulation_steps` is the number of rows of an optimizer step, however it is
    divided into forwards. The largest forward that fits without recomputing a layer is chosen; if none fits, a forward
    of one row, with as few layers recomputed as it needs.

    Args:
        model: on the meta device.
        dtype: of the computation.
    """
    ladder = choices.ladder(num_layers_with_backward(model), device)
    if choices.batch_size != "auto" and len(ladder) == 1:
        return Fit(choices.batch_size, choices.gradient_accumulation_steps, ladder[0])
    available = available_bytes(device)
    fits = possible_fits(choices, rows)
    if available is None:
        words = "this system does not say how much memory is free: as little as possible is recomputed"
        return replace(fits[-1], recomputing=ladder[0], words=words)
    usable_gib = available.of_device / 2**30
    for fit in fits:
        estimate = estimate_memory(model, parts, dtype, device.type, rows.largest_forward(fit.batch_size))
        # A smaller forward costs less time than recomputing.
        recomputing = estimate.fastest_fitting(ladder if fit is fits[-1] else ladder[:1], available)
        if recomputing is not None:
            words = f"about {estimate.peak_bytes(recomputing) / 2**30:.1f} GiB at the peak, of {usable_gib:.1f} usable"
            if recomputing.offloads_inputs:
                words += f", and {estimate.offloaded_bytes / 2**30:.1f} of the host's"
            return replace(fit, recomputing=recomputing, words=words)
    last = next(way for way in reversed(ladder) if not way.offloads_inputs or len(ladder) == 1)
    words = f"about {estimate.peak_bytes(last) / 2**30:.1f} GiB at the peak, more than the {usable_gib:.1f} usable"
    if estimate.offloaded_bytes > available.of_host and ladder[-1].offloads_inputs:
        words += (
            f"; the host would have to take {estimate.offloaded_bytes / 2**30:.1f} GiB of it, and has "
            f"{available.of_host / 2**30:.1f} free"
        )
    return replace(fits[-1], recomputing=last, words=f"{words}: it may not fit")


def available_bytes(device: torch.device) -> AvailableBytes | None:
    """Give what a run may take; None if the system does not say."""
    of_device = usable_bytes(device)
    if of_device is None:
        return None
    return AvailableBytes(of_device, (usable_bytes(torch.device("cpu")) or 0) if device.type == "cuda" else 0)


def possible_fits(choices: StepChoices, rows: StepRows) -> list[Fit]:
    """List the divisions of a step that the config allows, from full forwards to small; nothing is recomputed."""
    if choices.batch_size != "auto":
        return [Fit(choices.batch_size, choices.gradient_accumulation_steps)]
    num_step_rows = choices.gradient_accumulation_steps
    sizes = [size for size in range(num_step_rows, 0, -1) if num_step_rows % size == 0]
    return [
        Fit(size, num_step_rows // size)
        for size in sizes
        if size == 1 or sum(rows.largest_forward(size)) <= _ENOUGH_FORWARD_TOKENS
    ]


def tried_fit(
    fit: Fit,
    choices: StepChoices,
    model: TransformerDecoder,
    rows: StepRows,
    parts: StepParts,
    options_of: Callable[[Fit], ForwardOptions],
    device: torch.device,
) -> Fit:
    """On CUDA, try what `auto` has chosen with the largest possible step, and make it smaller until it fits.

    Args:
        model: with its weights, on the device.
        options_of: makes the options of a fit's forwards.

    Raises:
        RuntimeError: even the smallest does not fit.
    """
    if device.type != "cuda" or not fit.words:
        return fit
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_optimizer_bytes = optimizer_bytes(parts.new_optimizer, trained, trained[0].dtype)

    def try_step(fit: Fit) -> None:
        row_lengths = rows.largest_forward(fit.batch_size)
        batch = collate([{"tokens": [0] * length, "labels": [0] * length} for length in row_lengths])
        # The second forward has the gradients in memory too, and the optimizer's state to come.
        optimizer_state = torch.empty(num_optimizer_bytes, dtype=torch.uint8, device=device)
        try:
            loss_of = supervised_loss(model.train(), parts.loss_function, options_of(fit))
            with gradients_freed(model, frees=parts.frees_gradients):
                accumulate_gradients([batch] * min(2, fit.gradient_accumulation_steps), loss_of, scaler, device)
        finally:
            model.zero_grad(set_to_none=True)
            del optimizer_state

    ladder = choices.ladder(num_layers_with_backward(model), device)
    fit = first_fitting(fit, ladder, may_shrink=choices.batch_size == "auto", try_step=try_step)
    torch.cuda.reset_peak_memory_stats(device)  # a try that did not fit must not count as the run's peak
    return fit


def first_fitting(fit: Fit, ladder: Sequence[Recomputing], *, may_shrink: bool, try_step: Callable[[Fit], None]) -> Fit:
    """Return the first choice, from `fit` on to smaller ones, whose largest step fits the device.

    Args:
        ladder: the ways to recompute that the config allows.
        may_shrink: whether the config leaves the rows of a forward open.
        try_step: runs the largest step; raises an error of :func:`is_out_of_memory` where it does not fit.

    Raises:
        RuntimeError: even the smallest does not fit.
    """
    while True:
        try:
            try_step(fit)
            return fit
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # All layers, not one more: the estimate was wrong, and not by one layer.
            heavier = [
                way for way in ladder[ladder.index(fit.recomputing) + 1 :] if way.num_layers == ladder[-1].num_layers
            ]
            if may_shrink and fit.batch_size > 1:
                num_step_rows = fit.batch_size * fit.gradient_accumulation_steps
                size = next(size for size in range(fit.batch_size - 1, 0, -1) if num_step_rows % size == 0)
                fit = replace(fit, batch_size=size, gradient_accumulation_steps=num_step_rows // size)
            elif heavier:
                fit = replace(fit, recomputing=heavier[0])
            else:
                raise
        gc.collect()
        torch.cuda.empty_cache()


def describe_fit(fit: Fit, choices: StepChoices, num_layers: int) -> None:
    """Print what `auto` has chosen, where the config left something to choose."""
    if not fit.words:
        return
    chosen = []
    if choices.batch_size == "auto":
        chosen.append(f"batch_size {fit.batch_size}, gradient_accumulation_steps {fit.gradient_accumulation_steps}")
    if choices.recomputes == "auto" or fit.recomputing.offloads_inputs:
        inputs = ", their inputs kept in the host's memory" if fit.recomputing.offloads_inputs else ""
        chosen.append(f"{fit.recomputing.num_layers} of {num_layers} layers recomputed in the backward{inputs}")
    say(f"auto: {'; '.join(chosen)} ({fit.words})")
