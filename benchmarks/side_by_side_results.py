"""What side_by_side.py measures of a run, and how it prints and compares it."""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from benchmarks.rows import ForwardSize
from benchmarks.step_log import StepEnd
from benchmarks.tool_process import ToolProcess
from benchmarks.training_job import TrainingJob

# Half of bf16's spacing, relative: what one rounding can change.
FIRST_LOSS_TOLERANCE = 2**-8
OURS = "ours"
COLUMNS = (
    *("tool", "rows x forwards", "checkpointing", "s/step", "CPU s/step", "ceiling s", "step / ceiling", "tokens/s"),
    *("supervised/s", "anonymous GiB", "resident GiB", "first step s", "whole run s", "losses"),
)

Item = TypeVar("Item")


@dataclass(frozen=True)
class Result:
    """One tool's run of one configuration; see side_by_side.py for what the figures are."""

    tool: str
    batch_size: int
    gradient_accumulation_steps: int
    checkpointing: bool
    step_seconds: float
    step_processor_seconds: float
    ceiling_seconds: float | None
    tokens_per_second: float
    supervised_tokens_per_second: float
    peak_anonymous_gib: float
    peak_resident_gib: float
    first_step_seconds: float
    run_seconds: float
    losses: list[float]

    @property
    def configuration(self) -> str:
        checkpointing = "on" if self.checkpointing else "off"
        return f"{self.batch_size} x {self.gradient_accumulation_steps}, checkpointing {checkpointing}"

    def cells(self) -> list[str]:
        ceiling = self.ceiling_seconds
        return [
            self.tool,
            f"{self.batch_size} x {self.gradient_accumulation_steps}",
            "on" if self.checkpointing else "off",
            f"{self.step_seconds:.2f}",
            f"{self.step_processor_seconds:.2f}",
            *(("", "") if ceiling is None else (f"{ceiling:.2f}", f"{self.step_seconds / ceiling:.2f}")),
            f"{self.tokens_per_second:.0f}",
            f"{self.supervised_tokens_per_second:.0f}",
            f"{self.peak_anonymous_gib:.2f}",
            f"{self.peak_resident_gib:.2f}",
            f"{self.first_step_seconds:.1f}",
            f"{self.run_seconds:.1f}",
            " ".join(f"{loss:.3f}" for loss in self.losses),
        ]


def timed(steps: Sequence[Item]) -> Sequence[Item]:
    """The steps whose time counts: the first ones meet cold caches and memory that has yet to be mapped."""
    return steps[2:] if len(steps) > 3 else steps[1:] or steps


def differences(values: Sequence[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(values)]


def measured(
    tool: str,
    job: TrainingJob,
    process: ToolProcess,
    ends: Sequence[StepEnd],
    steps: Sequence[Sequence[ForwardSize]],
    ceiling_seconds: float | None,
) -> Result:
    """The figures of a run.

    Args:
        ends: of its optimizer steps.
        steps: of each, the tokens of its forwards.
        ceiling_seconds: the least time of a step; None: not known for this kind of run.
    """
    assert len(ends) == len(steps), (tool, len(ends), len(steps))
    moments = [process.started_at_seconds, *(end.ended_at_seconds for end in ends)]
    timed_seconds = timed(differences(moments))
    timed_forwards = [size for step in timed(steps) for size in step]
    return Result(
        tool=tool,
        batch_size=job.batch_size,
        gradient_accumulation_steps=job.gradient_accumulation_steps,
        checkpointing=job.checkpointing,
        step_seconds=statistics.median(timed_seconds),
        step_processor_seconds=statistics.median(timed(differences(list(map(process.processor_seconds, moments))))),
        ceiling_seconds=ceiling_seconds,
        tokens_per_second=sum(size.num_tokens for size in timed_forwards) / sum(timed_seconds),
        supervised_tokens_per_second=sum(size.num_supervised_tokens for size in timed_forwards) / sum(timed_seconds),
        peak_anonymous_gib=process.peak_anonymous_bytes(until_seconds=moments[-1]) / 2**30,
        peak_resident_gib=process.peak_resident_bytes / 2**30,
        first_step_seconds=moments[1] - moments[0],
        run_seconds=process.seconds,
        losses=[end.loss for end in ends],
    )


def table_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def comparisons(results: Sequence[Result], base_gib: float) -> Iterator[str]:
    """Our fastest run against the fastest of each other tool, with and without checkpointing and of both.

    Args:
        base_gib: what the base's weights take, the same for every tool.
    """
    for tool in dict.fromkeys(result.tool for result in results if result.tool != OURS):
        for wanted in ((True,), (False,), (True, False)):
            fastest = {
                result.tool: result
                for result in sorted(results, key=lambda result: -result.step_seconds)
                if result.checkpointing in wanted
            }
            if (
                OURS in fastest
                and tool in fastest
                and (len(wanted) == 1 or len({r.checkpointing for r in results}) == 2)
            ):
                ours, other = fastest[OURS], fastest[tool]
                yield (
                    f"ours ({ours.configuration}) takes {ours.step_seconds:.2f} s a step, {tool}'s fastest "
                    f"({other.configuration}) {other.step_seconds:.2f} s: {other.step_seconds / ours.step_seconds:.2f} "
                    f"times its speed, {other.step_processor_seconds / ours.step_processor_seconds:.2f} times in CPU "
                    f"seconds, with {ours.peak_anonymous_gib / other.peak_anonymous_gib:.2f} times its memory, "
                    f"{(ours.peak_anonymous_gib - base_gib) / (other.peak_anonymous_gib - base_gib):.2f} times above "
                    f"the {base_gib:.2f} GiB of the base's weights"
                )


def first_loss_difference(results: Sequence[Result]) -> tuple[float, float]:
    """The largest difference between any two first losses, and what the rounding of bf16 explains."""
    first_losses = [result.losses[0] for result in results]
    return max(first_losses) - min(first_losses), FIRST_LOSS_TOLERANCE * max(first_losses)
