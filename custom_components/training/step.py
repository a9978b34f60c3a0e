"""An optimizer step, around the forwards and backwards that give its gradients."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from custom_components.datasets.batching import Batch
from custom_components.training.optimizer import clip_gradients, set_rates, update_weights
from custom_components.training.optimizer_in_backward import OptimizerInBackward
from custom_components.training.plan import PlannedStep
from custom_components.training.state import TrainingState


@dataclass(frozen=True)
class StepResult:
    """The result of an optimizer step.

    Attributes:
        loss: per supervised token, in nats.
        grad_norm: before clipping.
        rate: of the first parameter group.
        seconds: that it took.
    """

    loss: float
    grad_norm: float
    rate: float
    seconds: float


def begin_step(step: PlannedStep, state: TrainingState) -> None:
    """Seed what a step draws, dropout and NEFTune's noise, and set the rates of the step."""
    torch.manual_seed(step.seed)
    set_rates(state.optimizer, state.peak_rates, step.rate_factor)


def finish_step(
    step: PlannedStep,
    state: TrainingState,
    batches: Sequence[Batch],
    mean_loss: Tensor,
    clip_grad_norm: float | None,
    start_seconds: float,
) -> StepResult:
    """Clip the gradients, let the optimizer take the step, and count it in the state's progress.

    Args:
        batches: of the step's forwards.
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
    state.progress.add_step(sum(batch.num_tokens for batch in batches), seconds, is_skipped)
    return StepResult(loss, grad_norm, state.peak_rates[0] * step.rate_factor, seconds)
