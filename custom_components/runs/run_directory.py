"""The directory that a run writes."""

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from custom_components.runs.checkpoints import run_checkpoints
from custom_components.runs.recognition import (
    ADAPTER,
    CHECKPOINT,
    RUN_CONFIG_NAME,
    STEP_DIRECTORY,
    TRIAL_NAME,
    is_logged_config,
    is_metrics,
    is_plot,
    is_reference,
    is_run_config,
    is_samples,
    is_wandb_run,
)
from custom_components.runtime.atomic_files import sweep_unfinished, whole_file
from custom_components.runtime.disk_errors import disk_errors_of
from custom_components.runtime.errors import UserError
from custom_components.runtime.ownership import OwnDirectory, Recognises, first_foreign

# What flock says on Lustre without -o flock, and on file systems of FUSE.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


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
    def reference(self) -> Path:
        """How the reference model rates the pairs of a preference run."""
        return self.path / "reference_log_probabilities.json"

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
            self.reference: is_reference,
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
    check_results(path, overwrite=overwrite, resumes=resumes)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_nothing_left_unless_begun(directory))
        try:
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(path / ".lock"))
            sweep_unfinished(path, {"adapter": ADAPTER, re.escape(TRIAL_NAME): CHECKPOINT})
            sweep_unfinished(directory.checkpoints, {STEP_DIRECTORY: CHECKPOINT})
            check_results(path, overwrite=overwrite, resumes=resumes)
        except BlockingIOError:
            raise UserError(f"output_dir: another run is writing to {str(path)!r}; name another directory") from None
        except OSError as error:
            raise UserError(f"output_dir: {str(path)!r} cannot be written ({error.strerror}); name another") from None
        advice = (
            "free space there, and go on from the last checkpoint, if there is one, with resume_from_checkpoint=true"
        )
        with disk_errors_of("output_dir", path, advice):
            yield directory


def begin_in(directory: RunDirectory, config: str, *, overwrites: bool) -> None:
    """Delete what an earlier run wrote, if it is to be replaced, and write config.yaml.

    The earlier config.yaml goes last: until then it tells whose the rest is.

    Raises:
        UserError: something that no run wrote is in the way.
    """
    if overwrites:
        check_results(directory.path, overwrite=True, resumes=False)
        for path, own in directory.results().items():
            if isinstance(own, OwnDirectory):
                own.remove(path)
            elif path != directory.config:
                path.unlink()
    with whole_file(directory.config) as aside:
        aside.write_text(config, encoding="utf-8")


@contextlib.contextmanager
def _nothing_left_unless_begun(directory: RunDirectory) -> Iterator[None]:
    """Take the directories away that were made for a run that fails before it begins."""
    lock = directory.path / ".lock"
    made = [path for path in (directory.checkpoints, directory.path, *directory.path.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        if directory.path in made and not directory.config.exists():
            with contextlib.suppress(OSError):
                lock.unlink(missing_ok=True)
                for path in made:
                    if path.exists():
                        path.rmdir()
        raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    # note: no "w", which would empty what is there, and no link, which may lead to any file.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        try:
            # note: the system gives the lock back when the process dies, however it dies.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(
                f"warning: the file system of output_dir {str(path.parent)!r} has no locks ({error.strerror}): nothing "
                "keeps a second run from writing there"
            )
        yield
    finally:
        os.close(descriptor)


def check_results(path: Path, *, overwrite: bool, resumes: bool) -> None:
    """Refuse a directory whose results are not to be replaced, or not a run's; see :func:`run_directory`.

    Raises:
        UserError: it is such a one.
    """
    directory = RunDirectory(path)
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
