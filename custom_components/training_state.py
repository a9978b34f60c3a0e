"""What a training run has to remember: everything else, rates, row order, dropout, is a function of the step.

A checkpoint is a directory `checkpoints/step_000200/` with an `adapter/` of the usual form, the optimizer's state, the
progress, and the config it was trained with; whole or absent.
"""

import dataclasses
import math
import pickle
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer
from torchtune.modules import TransformerDecoder

from custom_components.adapters import PromptFormat, load_adapter, save_adapter
from custom_components.atomic_files import whole_directory
from custom_components.config import write_yaml
from custom_components.errors import UserError
from custom_components.settings import TrainingSettings

STATE_NAME = "state.pt"
CONFIG_NAME = "config.yaml"
_STEP_DIRECTORY = re.compile(r"step_(\d{6,})")

# What may differ on resuming without a word: where things lie, and what is said and kept.
_UNDECISIVE_KEYS = {
    *(
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "init_adapter_from",
        "cache_dir",
        "quantized_cache",
        "sample_prompts",
    ),
    *("log_every_n_steps", "metric_logger", "save_every_n_steps", "keep_last_n_checkpoints", "verify_base"),
}
# Changing these gives other shapes or another order of the data: the run would not be the one that was begun.
_FIXED_KEYS = {
    *("lora_rank", "lora_alpha", "lora_attn_modules", "apply_lora_to_mlp", "apply_lora_to_output"),
    *("use_dora", "use_rslora", "quantize_base"),
    *("max_seq_len", "prompt_template", "train_on", "val_fraction", "packed", "group_by_length", "shuffle", "seed"),
    *("batch_size", "gradient_accumulation_steps", "max_steps_per_epoch", "lora_plus_ratio", "optimizer._component_"),
}


@dataclass
class Progress:
    """How far a run is, and how well it stands.

    Attributes:
        num_skipped_steps: optimizer steps that the gradient scaler left out, because fp16 gradients overflowed.
        best_step: the step of the lowest validation loss so far; None before the first validation.
        num_validations_since_best: for early stopping.
    """

    num_steps: int = 0
    num_skipped_steps: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    best_val_loss: float = math.inf
    best_step: int | None = None
    num_validations_since_best: int = 0

    def add_step(self, num_tokens: int, seconds: float, is_skipped: bool) -> None:
        self.num_steps += 1
        self.num_skipped_steps += is_skipped
        self.num_tokens += num_tokens
        self.seconds += seconds

    def stops_early(self, patience: int | None) -> bool:
        """Whether so many validations in a row were no better than the best; None: never."""
        return patience is not None and self.num_validations_since_best >= patience

    def add_validation(self, val_loss: float) -> bool:
        """Count a validation after the last step; returns whether it is the best so far."""
        if val_loss >= self.best_val_loss:
            self.num_validations_since_best += 1
            return False
        self.best_val_loss, self.best_step, self.num_validations_since_best = val_loss, self.num_steps, 0
        return True


@dataclass
class TrainingState:
    """All that changes while training, beside the adapter in the model.

    Attributes:
        data_digest: of the rows trained on; another data set cannot go on from here.
        best_adapter: the adapter's parameters at the best validation, by name; empty before the first.
    """

    optimizer: Optimizer
    scaler: GradScaler
    data_digest: str
    progress: Progress = field(default_factory=Progress)
    best_adapter: dict[str, Tensor] = field(default_factory=dict)

    def keep_best(self, model: TransformerDecoder) -> None:
        self.best_adapter = {
            name: parameter.detach().cpu().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }


def checkpoint_path(run_path: Path, step: int) -> Path:
    return run_path / "checkpoints" / f"step_{step:06}"


def save_checkpoint(
    run_path: Path,
    model: TransformerDecoder,
    state: TrainingState,
    settings: TrainingSettings,
    base_model: str,
    prompt_format: PromptFormat,
) -> None:
    """Write the checkpoint of the last step, then delete all but the best and the newest `keep_last_n_checkpoints`.

    Raises:
        UserError: it cannot be written; the checkpoints before it are untouched.
    """
    path = checkpoint_path(run_path, state.progress.num_steps)
    try:
        with whole_directory(path) as directory:
            save_adapter(model, directory / "adapter", base_model, prompt_format)
            write_yaml(settings, directory / CONFIG_NAME)
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
    _delete_old_checkpoints(run_path, settings.keep_last_n_checkpoints, state.progress.best_step)


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
    for path in reversed(_checkpoints(run_path)):
        try:
            _read_state(path)
        except UserError as error:
            print(f"passed over: {error}")
            continue
        return path
    raise UserError(f"resume_from_checkpoint: there is no whole checkpoint in {str(run_path / 'checkpoints')!r}")


def check_resumed_config(path: Path, settings: TrainingSettings) -> None:
    """Hold a config against that of the checkpoint it goes on from, and list what differs.

    Raises:
        UserError: for differences that change shapes or the order of the data, all at once.
    """
    before = _config_of(path)
    now = _flat(settings.model_dump(mode="json"))
    refusals = []
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) == now.get(key) or key.partition(".")[0] in _UNDECISIVE_KEYS:
            continue
        difference = f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        if key in _FIXED_KEYS or key.partition(".")[0] in _FIXED_KEYS:
            refusals.append(f"resume_from_checkpoint: {difference}: set it back, or begin a new run")
        elif not ("." in key and key.endswith(("checkpoint_dir", "path", "cache_dir"))):
            print(f"differs from the checkpoint: {difference}")
    if refusals:
        raise UserError(*refusals)


def with_batches_of(path: Path, settings: TrainingSettings) -> TrainingSettings:
    """A config whose `batch_size: auto` is what it came to when the checkpoint's run began.

    Raises:
        UserError: the rows of an optimizer step are others now.
    """
    if settings.batch_size != "auto":
        return settings
    before = _config_of(path)
    num_step_rows = before["batch_size"] * before["gradient_accumulation_steps"]
    if settings.gradient_accumulation_steps != num_step_rows:
        raise UserError(
            f"resume_from_checkpoint: gradient_accumulation_steps, with batch_size auto the rows of a step, was "
            f"{num_step_rows}, now {settings.gradient_accumulation_steps}: set it back, or begin a new run"
        )
    return settings.model_copy(update={key: before[key] for key in ("batch_size", "gradient_accumulation_steps")})


def _config_of(path: Path) -> dict[str, Any]:
    try:
        return _flat(yaml.safe_load((path / CONFIG_NAME).read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise UserError(f"resume_from_checkpoint: {str(path / CONFIG_NAME)!r} cannot be read ({error})") from None


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


def _checkpoints(run_path: Path) -> list[Path]:
    """Oldest first, by step."""
    paths = [path for path in (run_path / "checkpoints").glob("step_*") if _STEP_DIRECTORY.fullmatch(path.name)]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step_")))


def delete_checkpoints_after(run_path: Path, step: int) -> None:
    """Delete the checkpoints of steps that are about to be taken anew, in another way perhaps."""
    for path in _checkpoints(run_path):
        if path.name > checkpoint_path(run_path, step).name:
            shutil.rmtree(path)


def _delete_old_checkpoints(run_path: Path, num_kept: int, best_step: int | None) -> None:
    for path in _checkpoints(run_path)[:-num_kept]:
        if best_step is None or path != checkpoint_path(run_path, best_step):
            shutil.rmtree(path)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
