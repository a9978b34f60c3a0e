"""The plan of a training run: every optimizer step is known before the first, so resuming has nothing to remember."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from custom_components.config.components import instantiate
from custom_components.config.training_settings import TrainingSettings
from custom_components.datasets.batching import BatchPlan
from custom_components.training import schedules


@dataclass(frozen=True)
class PlannedStep:
    """One optimizer step.

    Attributes:
        number: counted from 1.
        epoch: counted from 0.
        forwards: the rows of each forward, by index.
        seed: for what the first forward draws: dropout and NEFTune's noise.
        rate_factor: the share of the peak learning rate.
        validates: a validation follows.
        saves: a run checkpoint follows, after the validation.
    """

    number: int
    epoch: int
    forwards: list[list[int]]
    seed: int
    rate_factor: float
    validates: bool
    saves: bool

    @property
    def seeds(self) -> list[int]:
        """A seed for each forward: what it draws does not depend on the forwards that a process takes before it."""
        others = (hashlib.sha256(f"{self.seed} {number}".encode()) for number in range(1, len(self.forwards)))
        return [self.seed, *(int.from_bytes(digest.digest()[:8]) for digest in others)]


@dataclass(frozen=True)
class Plan:
    """All steps of a run, in order.

    Attributes:
        batch_size: rows of a forward; with packs, packs.
        num_warmup_steps: the first steps, over which the rate rises.
    """

    steps: list[PlannedStep]
    batch_size: int
    num_warmup_steps: int

    @property
    def num_forwards(self) -> int:
        return sum(len(step.forwards) for step in self.steps)


def long_warmup(plan: Plan, peak_rate: float) -> str | None:
    """Say which rates a run has whose warm-up is longer than itself; None where the warm-up fits in."""
    num_steps, num_warmup_steps = len(plan.steps), plan.num_warmup_steps
    if num_warmup_steps <= num_steps:
        return None
    first, last = (peak_rate * step / num_warmup_steps for step in (1, num_steps))
    return (
        f"the warm-up of {num_warmup_steps} steps is longer than the run of {num_steps}: the learning rate rises from "
        f"{first:.3g} to {last:.3g} and never reaches {peak_rate:g}; set warmup_steps lower"
    )


def batch_plan(settings: TrainingSettings, pack_capacity_tokens: int | None) -> BatchPlan:
    """Read how rows become steps from a config whose `batch_size` is a number.

    Args:
        pack_capacity_tokens: the tokens of a pack.
    """
    assert settings.batch_size != "auto"
    return BatchPlan(
        settings.batch_size,
        settings.gradient_accumulation_steps,
        settings.shuffle,
        settings.seed,
        pack_capacity_tokens=pack_capacity_tokens if settings.packed else None,
        group_by_length=settings.group_by_length,
        max_steps_per_epoch=settings.max_steps_per_epoch,
    )


def plan_of(
    settings: TrainingSettings, lengths: Sequence[int], pack_capacity_tokens: int | None, *, has_validation: bool
) -> Plan:
    """Plan the steps of a training config, a pure function of it and of the rows' lengths.

    This is where the settings become a plan: nothing else in this room takes them as a whole.

    Args:
        lengths: tokens of each row.
        pack_capacity_tokens: the tokens of a pack.
        has_validation: there are rows to validate on.
    """
    batches = batch_plan(settings, pack_capacity_tokens)
    steps = batches.run_steps(lengths, settings.epochs, settings.max_steps)
    num_warmup_steps = schedules.num_warmup_steps(settings.warmup_steps, settings.warmup_ratio, len(steps))
    planned = []
    for number, (epoch, forwards) in enumerate(steps, 1):
        is_last = number == len(steps)
        ends_epoch = is_last or steps[number][0] != epoch
        planned.append(
            PlannedStep(
                number=number,
                epoch=epoch,
                forwards=forwards,
                seed=settings.seed * 2**20 + number,
                rate_factor=instantiate(
                    settings.lr_scheduler, step=number, num_steps=len(steps), num_warmup_steps=num_warmup_steps
                ),
                validates=has_validation and (ends_epoch or _is_due(number, settings.run_val_every_n_steps)),
                saves=is_last
                or _is_due(number, settings.save_every_n_steps)
                or (settings.save_every_n_steps is None and ends_epoch),
            )
        )
    return Plan(planned, batches.batch_size, num_warmup_steps)


def _is_due(number: int, every_n_steps: int | None) -> bool:
    return every_n_steps is not None and number % every_n_steps == 0
