"""Choice of the rows of a forward and of recomputed layers, so that a run fits its device: `auto` in the config."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest
from typing import Literal

import torch
from torchtune.modules import TransformerDecoder

from custom_components.datasets.batching import collate
from custom_components.memory.estimate import StepParts, estimate_memory, optimizer_bytes
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
    """

    batch_size: int | Literal["auto"]
    gradient_accumulation_steps: int
    recomputes: bool | Literal["auto"]


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
        num_recomputed_layers: the first so many layers that have a backward keep only their input for it.
        words: the reason for the choice; empty if the config left nothing to choose.
    """

    batch_size: int
    gradient_accumulation_steps: int
    num_recomputed_layers: int
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
    num_layers = num_layers_with_backward(model)
    if choices.batch_size != "auto" and choices.recomputes != "auto":
        return Fit(choices.batch_size, choices.gradient_accumulation_steps, num_layers if choices.recomputes else 0)
    available_bytes = usable_bytes(device)
    fits = possible_fits(choices, rows)
    if available_bytes is None:
        return replace(fits[-1], words="this system does not say how much memory is free: nothing is recomputed")
    gib = available_bytes / 2**30
    for fit in fits:
        estimate = estimate_memory(model, parts, dtype, device.type, rows.largest_forward(fit.batch_size))
        if choices.recomputes == "auto":
            num_recomputed_layers = estimate.num_recomputed_layers(available_bytes)
            is_last = fit is fits[-1]
            is_fitting = num_recomputed_layers == 0 or (is_last and num_recomputed_layers is not None)
        else:
            num_recomputed_layers = num_layers if choices.recomputes else 0
            is_fitting = estimate.peak_bytes(num_recomputed_layers) <= available_bytes
        if is_fitting:
            assert num_recomputed_layers is not None
            peak_gib = estimate.peak_bytes(num_recomputed_layers) / 2**30
            words = f"about {peak_gib:.1f} GiB at the peak, of {gib:.1f} usable"
            return replace(fit, num_recomputed_layers=num_recomputed_layers, words=words)
    num_recomputed_layers = 0 if choices.recomputes is False else num_layers
    peak_gib = estimate.peak_bytes(num_recomputed_layers) / 2**30
    words = f"about {peak_gib:.1f} GiB at the peak, more than the {gib:.1f} usable: it may not fit"
    return replace(fits[-1], num_recomputed_layers=num_recomputed_layers, words=words)


def possible_fits(choices: StepChoices, rows: StepRows) -> list[Fit]:
    """List the divisions of a step that the config allows, from full forwards to small; nothing is recomputed."""
    if choices.batch_size != "auto":
        return [Fit(choices.batch_size, choices.gradient_accumulation_steps, 0)]
    num_step_rows = choices.gradient_accumulation_steps
    sizes = [size for size in range(num_step_rows, 0, -1) if num_step_rows % size == 0]
    return [
        Fit(size, num_step_rows // size, 0)
        for size in sizes
        if size == 1 or sum(rows.largest_forward(size)) <= _ENOUGH_FORWARD_TOKENS
    ]


def tried_fit(
    fit: Fit,
    choices: StepChoices,
    model: TransformerDecoder,
    rows: StepRows,
    parts: StepParts,
    options: ForwardOptions,
    device: torch.device,
) -> Fit:
    """On CUDA, try what `auto` has chosen with the largest possible step, and make it smaller until it fits.

    Args:
        model: with its weights, on the device.
        options: of a forward; how many layers are recomputed is the fit's.

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
            tried_options = replace(options, num_recomputed_layers=fit.num_recomputed_layers)
            loss_of = supervised_loss(model.train(), parts.loss_function, tried_options)
            with gradients_freed(model, frees=parts.frees_gradients):
                accumulate_gradients([batch] * min(2, fit.gradient_accumulation_steps), loss_of, scaler, device)
        finally:
            model.zero_grad(set_to_none=True)
            del optimizer_state

    fit = first_fitting(
        fit,
        num_layers_with_backward(model),
        may_recompute=choices.recomputes == "auto",
        may_shrink=choices.batch_size == "auto",
        try_step=try_step,
    )
    torch.cuda.reset_peak_memory_stats(device)  # a try that did not fit must not count as the run's peak
    return fit


def first_fitting(
    fit: Fit, num_layers: int, *, may_recompute: bool, may_shrink: bool, try_step: Callable[[Fit], None]
) -> Fit:
    """Return the first choice, from `fit` on to smaller ones, whose largest step fits the device.

    Args:
        may_recompute, may_shrink: whether the config leaves recomputing and the rows of a forward open.
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
            if may_shrink and fit.batch_size > 1:
                num_step_rows = fit.batch_size * fit.gradient_accumulation_steps
                size = next(size for size in range(fit.batch_size - 1, 0, -1) if num_step_rows % size == 0)
                fit = replace(fit, batch_size=size, gradient_accumulation_steps=num_step_rows // size)
            elif may_recompute and fit.num_recomputed_layers < num_layers:
                fit = replace(fit, num_recomputed_layers=num_layers)
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
    if choices.recomputes == "auto":
        chosen.append(f"{fit.num_recomputed_layers} of {num_layers} layers recomputed in the backward")
    say(f"auto: {'; '.join(chosen)} ({fit.words})")
