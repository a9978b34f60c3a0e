"""The directory that a run writes."""

import contextlib
import errno
import fcntl
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from custom_components.runtime.atomic_files import sweep_unfinished
from custom_components.runtime.errors import UserError

RUN_CONFIG_NAME = "config.yaml"


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
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"


@contextlib.contextmanager
def run_directory(path: Path, *, overwrite: bool, resumes: bool) -> Iterator[RunDirectory]:
    """The directory of a run, held by this process alone for the time of the block.

    Args:
        overwrite: delete the results that lie there.
        resumes: go on with the run that lies there.

    Raises:
        UserError: another process is writing there, it holds a run already and neither is set, or nothing can be
            written there.
    """
    directory = RunDirectory(path)
    with contextlib.ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((path / ".lock").open("w"))
            # note: the system gives the lock back when the process dies, however it dies.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for folder in (path, directory.checkpoints):
                sweep_unfinished(folder)
            if not resumes:
                _make_room(directory, overwrite)
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


def _make_room(directory: RunDirectory, overwrite: bool) -> None:
    results = (
        *(directory.config, directory.metrics, directory.samples, directory.plot),
        *(directory.adapter, directory.checkpoints),
    )
    if not overwrite and any(result.exists() for result in results):
        raise UserError(
            f"output_dir: {str(directory.path)!r} holds the results of a run; name another, set "
            "overwrite_output_dir=true, or go on with it by resume_from_checkpoint=true"
        )
    for result in results:
        if result.is_dir():
            shutil.rmtree(result)
        else:
            result.unlink(missing_ok=True)
