"""Run checkpoints: what a run saves to go on from, in `checkpoints/step_000200/`, whole or absent.

Each has an `adapter/` of the usual form, the optimizer's state, the progress, and the config it was trained with.
Everything else, rates, row order, dropout, is a function of the step.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torchtune.modules import TransformerDecoder

from custom_components.runs.recognition import CHECKPOINT, RUN_CONFIG_NAME, STATE_NAME, STEP_DIRECTORY
from custom_components.runtime.atomic_files import whole_directory
from custom_components.runtime.errors import UserError
from custom_components.training.state import TrainingState
from custom_components.weights.adapters import save_adapter


@dataclass(frozen=True)
class BesideWeights:
    """What a run saves beside its adapter's weights, the same at every step.

    Attributes:
        base_model: the base's name on the hub, or its directory.
        adapter_texts: files of the adapter's directory, the prompt format for example: content by file name.
        config: the text of the run's config.yaml.
    """

    base_model: str
    adapter_texts: Mapping[str, str]
    config: str


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
    run_path: Path, model: TransformerDecoder, state: TrainingState, beside: BesideWeights, num_kept: int
) -> None:
    """Write the checkpoint of the last step, then delete the old ones.

    Args:
        num_kept: so many of the newest checkpoints stay, and the best.

    Raises:
        UserError: it cannot be written; the checkpoints before it are untouched.
    """
    path = run_checkpoint_path(run_path, state.progress.num_steps)
    try:
        with whole_directory(path) as directory:
            save_adapter(model, directory / "adapter", beside.base_model, beside.adapter_texts)
            (directory / RUN_CONFIG_NAME).write_text(beside.config, encoding="utf-8")
            stored = {
                "optimizer": state.optimizer.state_dict(),
                "scaler": state.scaler.state_dict(),
                "data_digest": state.data_digest,
                "progress": dataclasses.asdict(state.progress),
                "best_adapter": state.best_adapter,
            }
            torch.save(stored, directory / STATE_NAME)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"output_dir: the checkpoint {str(path)!r} could not be written ({error}); free some space and go on with "
            "resume_from_checkpoint=true from the last one, which is whole"
        ) from None
    _delete_old_checkpoints(run_path, num_kept, state.progress.best_step)


def delete_checkpoints_after(run_path: Path, step: int) -> None:
    """Delete the checkpoints of steps that a resumed run takes anew, with other settings perhaps."""
    for path in run_checkpoints(run_path):
        if _step_of(path) > step:
            CHECKPOINT.remove(path)


def _delete_old_checkpoints(run_path: Path, num_kept: int, best_step: int | None) -> None:
    for path in run_checkpoints(run_path)[:-num_kept]:
        if best_step is None or path != run_checkpoint_path(run_path, best_step):
            CHECKPOINT.remove(path)
