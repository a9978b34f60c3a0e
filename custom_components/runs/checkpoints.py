"""What a training run has to remember: everything else, rates, row order, dropout, is a function of the step.

A checkpoint is a directory `checkpoints/step_000200/` with an `adapter/` of the usual form, the optimizer's state, the
progress, and the config it was trained with; whole or absent.
"""

import dataclasses
import pickle
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchtune.modules import TransformerDecoder

from custom_components.runtime.atomic_files import whole_directory
from custom_components.runtime.errors import UserError
from custom_components.training.state import Progress, TrainingState
from custom_components.weights.adapters import load_adapter, save_adapter

STATE_NAME = "state.pt"
CONFIG_NAME = "config.yaml"
_STEP_DIRECTORY = re.compile(r"step_(\d{6,})")


def checkpoint_path(run_path: Path, step: int) -> Path:
    return run_path / "checkpoints" / f"step_{step:06}"


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


def save_checkpoint(
    run_path: Path, model: TransformerDecoder, state: TrainingState, beside: BesideWeights, num_kept: int
) -> None:
    """Write the checkpoint of the last step, then delete the old ones.

    Args:
        num_kept: so many of the newest checkpoints stay, and the best.

    Raises:
        UserError: it cannot be written; the checkpoints before it are untouched.
    """
    path = checkpoint_path(run_path, state.progress.num_steps)
    try:
        with whole_directory(path) as directory:
            save_adapter(model, directory / "adapter", beside.base_model, beside.adapter_texts)
            (directory / CONFIG_NAME).write_text(beside.config, encoding="utf-8")
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


def find_checkpoint(resume_from_checkpoint: bool | str, run_path: Path) -> Path | None:
    """The checkpoint that the config asks to go on from; None for a new run.

    Raises:
        UserError: there is none, or the one named is not whole.
    """
    if resume_from_checkpoint is False:
        return None
    if isinstance(resume_from_checkpoint, str):
        path = Path(resume_from_checkpoint).expanduser()
        if _STEP_DIRECTORY.fullmatch(path.name):
            _read_state(path)
            return path
        run_path = path
    for path in reversed(stored_checkpoints(run_path)):
        try:
            _read_state(path)
        except UserError as error:
            print(f"passed over: {error}")
            continue
        return path
    raise UserError(f"resume_from_checkpoint: there is no whole checkpoint in {str(run_path / 'checkpoints')!r}")


def load_checkpoint(path: Path, model: TransformerDecoder, state: TrainingState) -> None:
    """Bring model and state, in place, to where they were after the checkpoint's last step.

    Raises:
        UserError: a checkpoint of another data set, model or optimizer.
    """
    stored = _read_state(path)
    if stored["data_digest"] != state.data_digest:
        raise UserError(
            f"resume_from_checkpoint: {str(path)!r} was trained on other rows than dataset.source gives now; name the "
            "same data, or begin a new run"
        )
    load_adapter(model, path / "adapter")
    # note: load_state_dict brings back the groups' old settings; what the config says now is to hold.
    settings_now = [
        {key: value for key, value in group.items() if key != "params"} for group in state.optimizer.param_groups
    ]
    try:
        state.optimizer.load_state_dict(stored["optimizer"])
        state.scaler.load_state_dict(stored["scaler"])
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"resume_from_checkpoint: the optimizer's state in {str(path)!r} does not fit: {error}"
        ) from None
    for group, settings in zip(state.optimizer.param_groups, settings_now, strict=True):
        group.update(settings)
    state.progress = Progress(**stored["progress"])
    state.best_adapter = stored["best_adapter"]


def _read_state(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path / STATE_NAME, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"resume_from_checkpoint: {str(path)!r} is not a whole checkpoint ({reason})") from None


def stored_checkpoints(run_path: Path) -> list[Path]:
    """Oldest first, by step."""
    paths = [path for path in (run_path / "checkpoints").glob("step_*") if _STEP_DIRECTORY.fullmatch(path.name)]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step_")))


def _delete_old_checkpoints(run_path: Path, num_kept: int, best_step: int | None) -> None:
    for path in stored_checkpoints(run_path)[:-num_kept]:
        if best_step is None or path != checkpoint_path(run_path, best_step):
            shutil.rmtree(path)
