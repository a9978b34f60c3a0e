"""The directory that a run writes."""

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from custom_components.runs.checkpoints import run_checkpoints
from custom_components.runs.recognition import (
    ADAPTER_NAME,
    CHECKPOINT,
    RESULTS,
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
from custom_components.runtime.terminal import say

# What flock says on Lustre without -o flock, and on file systems of FUSE.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class RunDirectory:
    """Where each result of a training run is.

    Attributes:
        result_name: of the directory of the trained weights: adapter, or model.
    """

    path: Path
    result_name: str = ADAPTER_NAME

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
    def result(self) -> Path:
        """The trained weights."""
        return self.path / self.result_name

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
    def files_of_loggers(self) -> tuple[Path, ...]:
        """The files that are written when a logger gets the config."""
        return self.logged_config, self.wandb_run

    @property
    def has_only_begun(self) -> bool:
        """Whether a run died here before its first checkpoint."""
        return bool(self.results()) and not (run_checkpoints(self.path) or os.path.lexists(self.result))

    def results(self) -> dict[Path, Recognises | OwnDirectory]:
        """What is here of a run, by its names, and how each is recognised; other files are no concern of a run."""
        results: dict[Path, Recognises | OwnDirectory] = dict.fromkeys(run_checkpoints(self.path), CHECKPOINT)
        # What a run of another recipe left here is a result too, if it is one: folders of these names are not rare.
        others = {self.path / name: own for name, own in RESULTS.items() if name != self.result_name}
        results |= {path: own for path, own in others.items() if own.first_foreign(path) is None}
        results |= {self.result: RESULTS[self.result_name], **self.files}
        return {path: own for path, own in results.items() if os.path.lexists(path)}


@contextlib.contextmanager
def run_directory(
    path: Path, *, overwrite: bool, resumes: bool, result_name: str = ADAPTER_NAME
) -> Iterator[RunDirectory]:
    """Hold the directory of a run for this process alone, for the time of the block.

    Nothing in it is deleted yet, see :func:`begin_in`.

    Args:
        overwrite: the results of a run that are there may be replaced.
        resumes: go on with the run that is there.
        result_name: see :class:`RunDirectory`.

    Raises:
        UserError: another process is writing there, it holds a run already and neither is set, something that no run
            wrote is in the way, or nothing can be written there.
    """
    directory = RunDirectory(path, result_name)
    check_results(path, overwrite=overwrite, resumes=resumes, result_name=result_name)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_unchanged_unless_begun(directory))
        try:
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(path / ".lock"))
            sweep_unfinished(path, {**RESULTS, re.escape(TRIAL_NAME): CHECKPOINT})
            sweep_unfinished(directory.checkpoints, {STEP_DIRECTORY: CHECKPOINT})
            check_results(path, overwrite=overwrite, resumes=resumes, result_name=result_name)
        except BlockingIOError:
            raise UserError(f"output_dir: another run is writing to {str(path)!r}; name another directory") from None
        except OSError as error:
            raise UserError(f"output_dir: {str(path)!r} cannot be written ({error.strerror}); name another") from None
        advice = (
            "free space there, and go on from the last checkpoint, if there is one, with resume_from_checkpoint=true"
        )
        with disk_errors_of("output_dir", path, advice):
            yield directory


def begin_in(
    directory: RunDirectory, config: str, log_config: Callable[[str, RunDirectory], None], *, overwrites: bool
) -> None:
    """Log the config, delete what an earlier run wrote, if it is to be replaced, and write config.yaml.

    A logger that fails changes nothing. The earlier config.yaml goes last: until then it tells whose the rest is.

    Args:
        log_config: of a metric logger, see :class:`MetricLogger`.

    Raises:
        UserError: something that no run wrote is in the way.
    """
    if overwrites:
        check_results(directory.path, overwrite=True, resumes=False, result_name=directory.result_name)
    replaced = directory.results() if overwrites else {}
    replaced.pop(directory.reference, None)  # this run's own by now
    for path in directory.files_of_loggers:
        if replaced.pop(path, None) is not None:
            path.unlink()  # put back by run_directory if the logger fails
    log_config(config, directory)
    for path, own in replaced.items():
        if isinstance(own, OwnDirectory):
            own.remove(path)
        elif path != directory.config:
            path.unlink()
    with whole_file(directory.config) as aside:
        aside.write_text(config, encoding="utf-8")


@contextlib.contextmanager
def _unchanged_unless_begun(directory: RunDirectory) -> Iterator[None]:
    """Put the directory back as it was if the run fails before it begins, which is when it writes its config.yaml."""
    folders = (directory.checkpoints, directory.path, *directory.path.parents)
    made = [path for path in folders if not path.exists()]
    before = _modified(directory.config)
    of_loggers = {path: path.read_bytes() if path.is_file() else None for path in directory.files_of_loggers}
    try:
        yield
    except BaseException:
        if _modified(directory.config) == before:
            with contextlib.suppress(OSError):
                for path, content in of_loggers.items():
                    if content is None:
                        path.unlink(missing_ok=True)
                    elif not path.is_file() or path.read_bytes() != content:
                        path.write_bytes(content)
                for path in made:
                    if path.exists():
                        path.rmdir()
        raise


def _modified(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock. Its file stays, unless it was made here and no run has begun beside it."""
    descriptor, is_made = _opened_lock(path)
    is_held = False
    try:
        try:
            # note: the system gives the lock back when the process dies, however it dies.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            say(
                f"warning: the file system of output_dir {str(path.parent)!r} has no locks ({error.strerror}): nothing "
                "keeps a second run from writing there"
            )
        if os.fstat(descriptor).st_nlink == 0:  # deleted by a run that ended without beginning
            raise BlockingIOError
        is_held = True
        yield
    finally:
        # note: while it is locked, so that no other run has it.
        if is_made and is_held and not RunDirectory(path.parent).config.exists():
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _opened_lock(path: Path) -> tuple[int, bool]:
    """Open the file of a lock; return its descriptor, and whether it was made."""
    # note: no "w", which would empty what is there, and no link, which may lead to any file.
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW), False


def check_results(path: Path, *, overwrite: bool, resumes: bool, result_name: str = ADAPTER_NAME) -> None:
    """Refuse a directory whose results are not to be replaced, or not a run's; see :func:`run_directory`.

    Raises:
        UserError: it is such a one.
    """
    directory = RunDirectory(path, result_name)
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
    # A preference run's reference is written before the run begins, and is recognised by itself.
    if not resumes and results.keys() - {directory.reference} and directory.config not in results:
        foreign += [path for path in results if path not in foreign][:1]
    if foreign:
        raise UserError(
            *(
                f"output_dir: {str(path)!r} is not, as it is, what a run of this project wrote, and would be replaced; "
                "move it, or name another directory"
                for path in foreign
            )
        )
