"""The directory that a run writes."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from custom_components.runs.checkpoints import run_checkpoints
from custom_components.runs.recognition import (
    ADAPTER,
    CHECKPOINT,
    RUN_CONFIG_NAME,
    STEP_DIRECTORY,
    is_logged_config,
    is_metrics,
    is_plot,
    is_run_config,
    is_samples,
    is_wandb_run,
)
from custom_components.runtime.atomic_files import sweep_unfinished, whole_file
from custom_components.runtime.errors import UserError
from custom_components.runtime.ownership import OwnDirectory, Recognises, first_foreign


@dataclass(frozen=True)
class RunDirectory:
    """Where each result of a training run lies."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / RUN_CONFIG_NAME

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def plot(self) -> Path:
        return self.path / "loss.png"

    @property
    def logged_config(self) -> Path:
        """The config once more, as torchtune's loggers write it."""
        return self.path / "torchtune_config.yaml"

    @property
    def wandb_run(self) -> Path:
        return self.path / "wandb_run.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def files(self) -> dict[Path, Recognises]:
        """The files of a run, and how each is recognised."""
        return {
            self.metrics: is_metrics,
            self.samples: is_samples,
            self.plot: is_plot,
            self.logged_config: is_logged_config,
            self.wandb_run: is_wandb_run,
            self.config: is_run_config,
        }

    @property
    def has_only_begun(self) -> bool:
        """Whether a run died here before its first checkpoint."""
        return bool(self.results()) and not (run_checkpoints(self.path) or os.path.lexists(self.adapter))

    def results(self) -> dict[Path, Recognises | OwnDirectory]:
        """What is here of a run, by its names, and how each is recognised; other files are no concern of a run."""
        results: dict[Path, Recognises | OwnDirectory] = dict.fromkeys(run_checkpoints(self.path), CHECKPOINT)
        results |= {self.adapter: ADAPTER, **self.files}
        return {path: own for path, own in results.items() if os.path.lexists(path)}


@contextlib.contextmanager
def run_directory(path: Path, *, overwrite: bool, resumes: bool) -> Iterator[RunDirectory]:
    """Hold the directory of a run for this process alone, for the time of the block.

    Nothing in it is deleted yet, see :func:`begin_in`.

    Args:
        overwrite: the results of a run that are there may be replaced.
        resumes: go on with the run that is there.

    Raises:
        UserError: another process is writing there, it holds a run already and neither is set, something that no run
            wrote is in the way, or nothing can be written there.
    """
    directory = RunDirectory(path)
    _check_results(directory, overwrite, resumes)
    with contextlib.ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(path / ".lock"))
            sweep_unfinished(path, {"adapter": ADAPTER})
            sweep_unfinished(directory.checkpoints, {STEP_DIRECTORY: CHECKPOINT})
            _check_results(directory, overwrite, resumes)
        except BlockingIOError:
            raise UserError(f"output_dir: another run is writing to {str(path)!r}; name another directory") from None
        except OSError as error:
            raise UserError(f"output_dir: {str(path)!r} cannot be written ({error.strerror}); name another") from None
        try:
            yield directory
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            raise UserError(
                f"output_dir: {str(path)!r} cannot be written any more ({error.strerror}); free space"
            ) from None


def begin_in(directory: RunDirectory, config: str, *, overwrites: bool) -> None:
    """Delete what an earlier run wrote, if it is to be replaced, and write config.yaml.

    The earlier config.yaml goes last: until then it tells whose the rest is.

    Raises:
        UserError: something that no run wrote is in the way.
    """
    if overwrites:
        _check_results(directory, overwrite=True, resumes=False)
        for path, own in directory.results().items():
            if isinstance(own, OwnDirectory):
                own.remove(path)
            elif path != directory.config:
                path.unlink()
    with whole_file(directory.config) as aside:
        aside.write_text(config, encoding="utf-8")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    # note: no "w", which would empty what is there, and no link, which may lead to any file.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        # note: the system gives the lock back when the process dies, however it dies.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _check_results(directory: RunDirectory, overwrite: bool, resumes: bool) -> None:
    results = directory.results()
    if results and not (overwrite or resumes):
        raise UserError(
            f"output_dir: {str(directory.path)!r} holds the results of a run; name another, set "
            "overwrite_output_dir=true, or go on with it by resume_from_checkpoint=true"
        )
    if results and not resumes and directory.path.is_symlink():
        raise UserError(
            f"output_dir: {str(directory.path)!r} is a link, and nothing is overwritten through one; name "
            f"{str(directory.path.resolve())!r}"
        )
    foreign = [found for path, own in results.items() if (found := first_foreign(path, own)) is not None]
    if os.path.lexists(directory.checkpoints) and (
        directory.checkpoints.is_symlink() or not directory.checkpoints.is_dir()
    ):
        foreign.append(directory.checkpoints)
    if not resumes and results and directory.config not in results:
        foreign += [path for path in results if path not in foreign][:1]
    if foreign:
        raise UserError(
            *(
                f"output_dir: {str(path)!r} is not, as it is, what a run of this project wrote, and would be replaced; "
                "move it, or name another directory"
                for path in foreign
            )
        )
