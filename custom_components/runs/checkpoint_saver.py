"""When a run saves a checkpoint while it trains."""

from pathlib import Path

from custom_components.runs.checkpoints import run_checkpoint_path, run_checkpoints, save_run_checkpoint
from custom_components.runs.run import Run
from custom_components.runtime.stopping import SaveClock
from custom_components.training.plan import PlannedStep
from custom_components.training.state import TrainingState


class CheckpointSaver:
    """Saves a run's checkpoints: at the steps that the plan says, when it stops, and by the clock.

    Args:
        minutes: since the last save after which another is due; None: the clock does not matter.
        num_kept: see :func:`save_run_checkpoint`.

    Attributes:
        last: the last whole checkpoint of the run; None: there is none.
    """

    def __init__(self, run: Run, minutes: float | None, num_kept: int) -> None:
        self._run = run
        self._clock = SaveClock(minutes)
        self._num_kept = num_kept
        self.last: Path | None = next(reversed(run_checkpoints(run.directory.path)), None)

    def save_if_due(self, step: PlannedStep, state: TrainingState, *, now: bool) -> None:
        """Save after a step, if it is one to save after.

        Args:
            now: it is, whatever plan and clock say: no step follows, for example.

        Raises:
            UserError: see :func:`save_run_checkpoint`.
        """
        if step.saves or now or self._clock.is_due:
            run = self._run
            save_run_checkpoint(run.directory.path, run.weights, state, run.config, self._num_kept)
            self.last = run_checkpoint_path(run.directory.path, state.progress.num_steps)
            self._clock.restart()
