"""The directory that a run writes."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from custom_components.errors import UserError


@dataclass(frozen=True)
class RunDirectory:
    """Where each result of a training run lies."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def plot(self) -> Path:
        return self.path / "loss.png"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"


def prepare_run_directory(path: Path, overwrite: bool) -> RunDirectory:
    """Make the directory of a new run, after checking that it can be written.

    Raises:
        UserError: it holds a run already and `overwrite` is not set, or nothing can be written there.
    """
    run_directory = RunDirectory(path)
    results = (run_directory.config, run_directory.metrics, run_directory.plot, run_directory.adapter)
    if not overwrite and any(result.exists() for result in results):
        raise UserError(
            f"output_dir: {str(path)!r} holds the results of a run; name another, or set overwrite_output_dir=true"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        for result in results:
            if result.is_dir():
                shutil.rmtree(result)
            else:
                result.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: {str(path)!r} cannot be written ({error.strerror}); name another") from None
    return run_directory
