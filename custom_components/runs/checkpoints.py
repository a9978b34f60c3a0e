"""Run checkpoints: what a run saves to go on from, in `checkpoints/step_000200/`, whole or absent.

Each has the trained weights in a directory of the usual form, `adapter/` for example, the optimizer's state, the
progress, and the config it was trained with.
Everything else, rates, row order, dropout, is a function of the step.
"""

import dataclasses
import os
import re
import shutil
from pathlib import Path
from typing import BinaryIO, cast

import torch

from custom_components.runs.recognition import CHECKPOINT, RUN_CONFIG_NAME, STATE_NAME, STEP_DIRECTORY, TRIAL_NAME
from custom_components.runs.state_file import STATE_VERSION, weights_digests
from custom_components.runs.trained_weights import TrainedWeights
from custom_components.runtime.atomic_files import whole_directory
from custom_components.runtime.disk_errors import RememberingFile, disk_errors_of
from custom_components.runtime.errors import UserError
from custom_components.training.state import TrainingState

_ADVICE = "free space there, and go on from the last checkpoint, which is whole, with resume_from_checkpoint=true"
# What a state has later that it has not before the first step: AdamW's two moments, and the best adapter.
_NUM_TIMES_ADAPTER = 3
_NUM_ZEROS = 2**20  # written at a time


def run_checkpoint_path(run_path: Path, step: int) -> Path:
    return run_path / "checkpoints" / f"step_{step:06}"


def is_run_checkpoint(path: Path) -> bool:
    """Tell by its name whether a path is one of a run's checkpoints."""
    return re.fullmatch(STEP_DIRECTORY, path.name) is not None


def run_checkpoints(run_path: Path) -> list[Path]:
    """List a run's checkpoints, oldest first."""
    paths = [path for path in (run_path / "checkpoints").glob("step_*") if is_run_checkpoint(path)]
    return sorted(paths, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def save_run_checkpoint(
    run_path: Path, weights: TrainedWeights, state: TrainingState, config: str, num_kept: int
) -> None:
    """Write the checkpoint of the last step, then delete the old ones.

    Args:
        config: the text of the run's config.yaml.
        num_kept: so many of the newest checkpoints stay, and the best.

    Raises:
        UserError: it cannot be written; the checkpoints before it are untouched.
    """
    path = run_checkpoint_path(run_path, state.progress.num_steps)
    with disk_errors_of("output_dir", path, _ADVICE), whole_directory(path) as directory:
        _write_checkpoint(directory, weights, state, config)
    _delete_old_checkpoints(run_path, num_kept, state.progress.best_step)


def try_to_save(run_path: Path, weights: TrainedWeights, state: TrainingState, config: str) -> None:
    """Write a checkpoint as large as those to come, and delete it again.

    Raises:
        UserError: the disk is too small for it, or its file system takes none.
    """
    path = run_path / TRIAL_NAME
    num_adapter_bytes = sum(parameter.nbytes for group in state.optimizer.param_groups for parameter in group["params"])
    num_bytes = (1 + _NUM_TIMES_ADAPTER) * num_adapter_bytes
    advice = f"a checkpoint of this run takes up to {num_bytes / 1e6:.1f} MB; free space there, or name another"
    try:
        with disk_errors_of("output_dir", run_path, advice), whole_directory(path) as directory:
            _write_checkpoint(directory, weights, state, config)
            with (directory / STATE_NAME).open("ab") as file:
                num_zeros = 0 if state.optimizer.state else _NUM_TIMES_ADAPTER * num_adapter_bytes
                for start in range(0, num_zeros, _NUM_ZEROS):
                    file.write(bytes(min(_NUM_ZEROS, num_zeros - start)))
    except OSError as error:
        raise UserError(
            f"output_dir: a trial checkpoint cannot be written to {str(run_path)!r} ({error.strerror}), as on file "
            "systems that rename no directories; name a directory on another disk"
        ) from None
    CHECKPOINT.remove(path)


def _write_checkpoint(directory: Path, weights: TrainedWeights, state: TrainingState, config: str) -> None:
    weights.save(directory / weights.name)
    (directory / RUN_CONFIG_NAME).write_text(config, encoding="utf-8")
    stored = {
        "version": STATE_VERSION,
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "data_digest": state.data_digest,
        "num_ranks": state.num_ranks,
        "progress": dataclasses.asdict(state.progress),
        "best_adapter": state.best_adapter,
        "weights": weights_digests(directory / weights.name),
    }
    with (directory / STATE_NAME).open("wb") as opened:
        file = RememberingFile(opened)
        try:
            torch.save(stored, cast(BinaryIO, file))
        except RuntimeError:
            if file.error is not None:
                raise file.error from None
            raise


def delete_checkpoints_after(run_path: Path, step: int) -> None:
    """Delete the checkpoints of steps that a resumed run takes anew, with other settings perhaps."""
    for path in run_checkpoints(run_path):
        if _step_of(path) > step:
            CHECKPOINT.remove(path)


def _delete_old_checkpoints(run_path: Path, num_kept: int, best_step: int | None) -> None:
    for path in run_checkpoints(run_path)[:-num_kept]:
        if best_step is None or path != run_checkpoint_path(run_path, best_step):
            CHECKPOINT.remove(path)


def check_room(run_path: Path, num_bytes: int, num_checkpoints: int) -> None:
    """Reserve the disk space of checkpoints too large to be tried out, and give it back.

    Args:
        num_bytes: of a checkpoint.
        num_checkpoints: that are there at one time, besides those that are there now.

    Raises:
        UserError: the disk is too small for them.
    """
    advice = (
        f"a checkpoint of this run takes {num_bytes / 1e9:.3g} GB, and up to {num_checkpoints} more are there at a "
        "time; free space there, name another, or lower keep_last_n_checkpoints"
    )
    aside = run_path / f".{TRIAL_NAME}.writing-{os.getpid()}"
    aside.mkdir()
    try:
        with disk_errors_of("output_dir", run_path, advice), (aside / STATE_NAME).open("wb") as file:
            # note: a quota counts too, which the free space of the disk does not say.
            os.posix_fallocate(file.fileno(), 0, num_checkpoints * num_bytes)
    finally:
        shutil.rmtree(aside)
