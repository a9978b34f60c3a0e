"""Holding the config of a run against that of the checkpoint it continues from."""

import shutil
from pathlib import Path
from typing import Any

import yaml

from custom_components.config.renamed import rename_components
from custom_components.config.training_settings import TrainingSettings
from custom_components.runs.checkpoints import CONFIG_NAME, checkpoint_path, stored_checkpoints
from custom_components.runtime.errors import UserError

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
        values = yaml.safe_load((path / CONFIG_NAME).read_text(encoding="utf-8"))
        rename_components(values)
        return _flat(values)
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise UserError(f"resume_from_checkpoint: {str(path / CONFIG_NAME)!r} cannot be read ({error})") from None


def delete_checkpoints_after(run_path: Path, step: int) -> None:
    """Delete the checkpoints of steps that are about to be taken anew, in another way perhaps."""
    for path in stored_checkpoints(run_path):
        if path.name > checkpoint_path(run_path, step).name:
            shutil.rmtree(path)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
