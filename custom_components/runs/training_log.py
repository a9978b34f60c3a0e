"""The record of a run while it trains: metrics.jsonl, samples.jsonl, a metric logger, the terminal."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from custom_components.runs.metric_logger import MetricLogger
from custom_components.runs.metrics import MetricsFile, write_samples
from custom_components.runs.progress_bar import ProgressBar
from custom_components.runs.run import Run
from custom_components.training.plan import PlannedStep
from custom_components.training.step import StepResult

_NONE: Mapping[str, float] = {}


class TrainingLog(contextlib.AbstractContextManager):
    """Records the steps and validations of a run, every one flushed as it is written.

    The run begins in its directory, where it may replace an earlier one, with the first record, or at the block's end.

    Args:
        logger: gets the same numbers, and answers where it can.
        num_steps: of the whole run.
        num_done_steps: of those, the steps that an earlier process took.
    """

    def __init__(self, run: Run, logger: MetricLogger, num_steps: int, num_done_steps: int) -> None:
        self._run = run
        self._metrics: MetricsFile | None = None
        self._logger = logger
        self._bar = ProgressBar(num_steps, num_done_steps)

    def step(self, step: PlannedStep, result: StepResult, measures: Mapping[str, float] = _NONE) -> None:
        """Record an optimizer step.

        Args:
            measures: beside the loss, by name.
        """
        metrics = self._opened_metrics()
        counts = result.counts
        record = {
            "step": step.number,
            "epoch": step.epoch,
            "loss": result.loss,
            **measures,
            "lr": result.rate,
            "grad_norm": result.grad_norm,
            "tokens": counts.num_tokens,
            "supervised_tokens": counts.num_supervised_tokens,
            "step_seconds": result.seconds,
            "tokens_per_second": counts.num_tokens / result.seconds,
            "peak_memory_gib": self._run.memory.gib(),
        }
        metrics.write(record)
        if step.number % self._run.settings.log_every_n_steps == 0:
            self._logger.log(record, step.number)
        self._bar.update(step.number, result.loss)

    def validation(self, step: PlannedStep, val_loss: float, measures: Mapping[str, float] | None = None) -> None:
        """Record a validation after a step.

        Args:
            measures: beside the loss, by name, where the loss is not per token; None: it is, and has a perplexity.
        """
        beside = {"perplexity": math.exp(val_loss)} if measures is None else measures
        record = {"step": step.number, "val_loss": val_loss, **{f"val_{name}": beside[name] for name in beside}}
        self._opened_metrics().write(record)
        self._logger.log(record, step.number)

    def samples(self, step: PlannedStep, answers: Sequence[str]) -> None:
        """Record the answers to the config's sample prompts after a step, if there are any."""
        if not answers:
            return
        prompts = self._run.settings.sample_prompts
        write_samples(self._run.directory.samples, step.number, prompts, answers)
        self._logger.log_samples(prompts, answers, step.number)

    def say(self, text: str) -> None:
        """Print a line of its own beside the progress."""
        self._bar.say(text)

    def __exit__(self, error_type: type[BaseException] | None, *_: Any) -> None:
        self._bar.close()
        if error_type is None:
            self._opened_metrics()
        if self._metrics is not None:
            self._metrics.close()

    def _opened_metrics(self) -> MetricsFile:
        if self._metrics is None:
            self._logger.begin()
            self._metrics = MetricsFile(self._run.directory.metrics)
        return self._metrics


class NoTrainingLog(TrainingLog):
    """The record of a rank that leaves it to the first one: nothing."""

    def __init__(self) -> None:
        pass

    def step(self, *_: Any) -> None:
        pass

    def validation(self, *_: Any) -> None:
        pass

    def samples(self, *_: Any) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass
