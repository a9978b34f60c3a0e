"""An optimizer step, around the forwards and backwards that give its gradients."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from custom_components.datasets.batching import Batch
from custom_components.training.optimizer import clip_gradients, set_rates, update_weights
from custom_components.training.optimizer_in_backward import OptimizerInBackward
from custom_components.training.plan import PlannedStep
from custom_components.training.state import TrainingState


class StepCounts(NamedTuple):
    """What is counted in the forwards of an optimizer step.

    Attributes:
        num_units: what the sum of the losses is divided by.
    """

    num_units: int
    num_tokens: int
    num_supervised_tokens: int


@dataclass(frozen=True)
class StepResult:
    """The result of an optimizer step.

    Attributes:
        counts: of all its forwards.
        loss: per supervised token, in nats.
        grad_norm: before clipping.
        rate: of the first parameter group.
        seconds: that it took.
    """

    counts: StepCounts
    loss: float
    grad_norm: float
    rate: float
    seconds: float


def counts_of(batches: Sequence[Batch]) -> StepCounts:
    """Count the units and tokens of forwards."""
    return StepCounts(
        sum(batch.num_units for batch in batches),
        sum(batch.num_tokens for batch in batches),
        sum(batch.num_supervised_tokens for batch in batches),
    )


def begin_step(step: PlannedStep, state: TrainingState) -> None:
    """Set the rates of a step."""
    set_rates(state.optimizer, state.peak_rates, step.rate_factor)


def finish_step(
    step: PlannedStep,
    state: TrainingState,
    counts: StepCounts,
    mean_loss: Tensor,
    clip_grad_norm: float | None,
    start_seconds: float,
) -> StepResult:
    """Clip the gradients, let the optimizer take the step, and count it in the state's progress.

    Args:
        counts: of the step's forwards.
        mean_loss: what :func:`accumulate_gradients` returned.
        clip_grad_norm: see :func:`clip_gradients`.
        start_seconds: `time.perf_counter()` when the step began.

    Raises:
        UserError: loss or gradient is not finite, see :func:`update_weights`.
    """
    if isinstance(state.optimizer, OptimizerInBackward):
        norm = state.optimizer.gradient_norm()
    else:
        norm = clip_gradients(state.optimizer, state.scaler, clip_grad_norm)
    loss, grad_norm = torch.stack([mean_loss, norm]).tolist()  # note: the step's one CPU-GPU sync point
    is_skipped = update_weights(state.optimizer, state.scaler, loss, grad_norm, step.number, step.forwards)
    seconds = time.perf_counter() - start_seconds
    state.progress.add_step(counts.num_tokens, seconds, is_skipped)
    return StepResult(counts, loss, grad_norm, state.peak_rates[0] * step.rate_factor, seconds)
