"""Going on with a run: finding its last checkpoint, holding its config against today's, bringing its state back."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from custom_components.config.renamed import rename_components
from custom_components.config.settings import Settings
from custom_components.config.training_settings import TrainingSettings
from custom_components.runs.checkpoints import is_run_checkpoint, run_checkpoints
from custom_components.runs.recognition import RESULTS, RUN_CONFIG_KEYS, RUN_CONFIG_NAME
from custom_components.runs.run_config import flat_config
from custom_components.runs.run_directory import RunDirectory
from custom_components.runs.state_file import read_state, weights_digests
from custom_components.runs.trained_weights import TrainedWeights
from custom_components.runtime.errors import UserError
from custom_components.runtime.plain_yaml import MOST_YAML_BYTES, read_yaml
from custom_components.runtime.terminal import say
from custom_components.runtime.text_files import read_text
from custom_components.training.optimizer import load_optimizer_state
from custom_components.training.state import Progress, TrainingState
from custom_components.weights.card import TrainedSteps, stated_steps
from custom_components.weights.checkpoint_files import tensors_of_file

# Keys that may change on resume silently: where files are, and what is printed and kept.
_UNDECISIVE_KEYS = {
    *(
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "init_adapter_from",
        "cache_dir",
        "quantized_cache",
        "sample_prompts",
        "learning_rate",  # optimizer.lr says it
    ),
    *(
        "log_every_n_steps",
        "metric_logger",
        "save_every_n_steps",
        "save_every_minutes",
        "keep_last_n_checkpoints",
        "verify_base",
    ),
    *("parallelism", "collective_timeout_seconds"),
}
# Changing these gives other shapes or another order of the data: it would be a different run.
_FIXED_KEYS = {
    *("lora_rank", "lora_alpha", "lora_attn_modules", "apply_lora_to_mlp", "apply_lora_to_output"),
    *("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform"),
    *("quantize_base", "quantization", "init_lora_weights"),
    *("trainable_tokens", "train_only"),
    *("max_seq_len", "prompt_template", "train_on", "val_fraction", "packed", "group_by_length", "shuffle", "seed"),
    *("batch_size", "gradient_accumulation_steps", "max_steps_per_epoch", "lora_plus_ratio", "optimizer._component_"),
}


_BATCH_KEYS = ("batch_size", "gradient_accumulation_steps")
# The value of `resume_from_checkpoint` that goes on where there is a checkpoint and begins where there is none.
AUTO = "auto"

SettingsType = TypeVar("SettingsType", bound=TrainingSettings)


@dataclass(frozen=True)
class ResumedRun:
    """A run to go on with, opened at one of its checkpoints: state and config are read once.

    Attributes:
        path: of the run checkpoint.
        state: what :func:`save_run_checkpoint` stored; `restore` hands it on and leaves it empty.
        config: of the run so far, its nested keys joined by dots.
    """

    path: Path
    state: dict[str, Any]
    config: Mapping[str, Any]

    @property
    def directory(self) -> RunDirectory:
        """The directory of the run so far."""
        names = [name for name in RESULTS if (self.path / name).is_dir()]
        return RunDirectory(self.path.parent.parent, *names[:1])

    def is_inside(self, output_dir: Path) -> bool:
        """Tell whether the run goes on in the directory that it wrote so far."""
        return self.path.resolve().is_relative_to(output_dir.resolve())

    def fitted_batches(self, num_step_rows: int) -> dict[str, int]:
        """Give `batch_size` and `gradient_accumulation_steps` as `batch_size: auto` chose them when the run began.

        Args:
            num_step_rows: the rows of an optimizer step that the config states now.

        Raises:
            UserError: the rows of an optimizer step were others.
        """
        batches = {key: self.config[key] for key in _BATCH_KEYS}
        before = batches["batch_size"] * batches["gradient_accumulation_steps"]
        if num_step_rows != before:
            raise UserError(
                f"resume_from_checkpoint: gradient_accumulation_steps, with batch_size auto the rows of a step, was "
                f"{before}, now {num_step_rows}: set it back, or begin a new run"
            )
        return batches

    def check_config(self, config: Mapping[str, Any], settings_type: type[Settings]) -> None:
        """Hold a resolved config against that of the run so far, and list what differs.

        Args:
            settings_type: whose keys it has.

        Raises:
            UserError: for differences that change shapes or the order of the data, all at once.
        """
        now = flat_config(config)
        refusals = []
        for key in sorted(self.config.keys() | now.keys()):
            before, value = self.config.get(key), now.get(key)
            if before == value or key.partition(".")[0] in _UNDECISIVE_KEYS:
                continue
            if key not in self.config and _is_default(key, value, settings_type):
                continue  # a key that the run was begun without, and that changes nothing
            difference = f"{key} was {before!r}, now {value!r}"
            if key in _FIXED_KEYS or key.partition(".")[0] in _FIXED_KEYS:
                refusals.append(f"resume_from_checkpoint: {difference}: set it back, or begin a new run")
            elif not ("." in key and key.endswith(("checkpoint_dir", "path", "cache_dir"))):
                say(f"differs from the checkpoint: {difference}")
        if refusals:
            raise UserError(*refusals)

    def checked_settings(self, settings: SettingsType) -> SettingsType:
        """Hold a config against that of the run so far; return it with what `batch_size: auto` came to at its begin.

        Raises:
            UserError: see :meth:`check_config` and :meth:`fitted_batches`.
        """
        if settings.batch_size == "auto":
            settings = settings.model_copy(update=self.fitted_batches(settings.gradient_accumulation_steps))
        self.check_config(settings.model_dump(mode="json"), type(settings))
        return settings

    @property
    def num_ranks(self) -> int:
        """The ranks that the run was begun with."""
        return self.state.get("num_ranks", 1)  # note: runs of before there were several do not say

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        return Progress(**self.state["progress"])

    def is_finished(self, num_planned_steps: int, early_stopping_patience: int | None) -> bool:
        """Tell whether the run has its result: no step is left, and the weights of the last are saved."""
        progress = self.progress
        has_steps_left = progress.num_steps < num_planned_steps and not progress.stops_early(early_stopping_patience)
        finished = TrainedSteps(progress.num_steps, num_planned_steps, is_finished=True)
        return not has_steps_left and stated_steps(self.directory.result) == finished

    def restore(self, weights: TrainedWeights, state: TrainingState) -> None:
        """Bring weights and state, in place, to where they were after the checkpoint's last step.

        Raises:
            UserError: a checkpoint of another data set, model or optimizer.
        """
        if self.state["data_digest"] != state.data_digest:
            raise UserError(
                f"resume_from_checkpoint: {str(self.path)!r} was trained on other rows than dataset.source gives now; "
                "name the same data, or begin a new run"
            )
        weights.load(self.path / weights.name)
        try:
            _check_best(self.state["best_adapter"], weights)
            load_optimizer_state(state.optimizer, self.state["optimizer"])
            state.scaler.load_state_dict(self.state["scaler"])
        except (ValueError, LookupError, RuntimeError, TypeError, AttributeError) as error:
            raise UserError(
                f"resume_from_checkpoint: the optimizer's state in {str(self.path)!r} does not fit: {error}"
            ) from None
        state.progress = self.progress
        state.best_adapter = self.state["best_adapter"]
        self.state.clear()  # on a card the optimizer has copies: these would fill the host's memory for the whole run


def open_run_to_resume(resume_from_checkpoint: bool | str, run_path: Path) -> ResumedRun | None:
    """Open the run checkpoint that the config asks to go on from; None for a new run.

    Args:
        resume_from_checkpoint: True: the newest whole one in `run_path`; "auto": the same, if there is one; or a run's
            directory, or a checkpoint's.

    Raises:
        UserError: there is none, or the one named is not whole.
    """
    if resume_from_checkpoint is False:
        return None
    if isinstance(resume_from_checkpoint, str) and resume_from_checkpoint != AUTO:
        path = Path(resume_from_checkpoint).expanduser()
        if is_run_checkpoint(path):
            return _open(path)
        run_path = path
    for path in reversed(run_checkpoints(run_path)):
        try:
            return _open(path)
        except UserError as error:
            say(f"passed over: {error}")
    if resume_from_checkpoint == AUTO:
        return None
    raise UserError(f"resume_from_checkpoint: there is no whole checkpoint in {str(run_path / 'checkpoints')!r}")


def _check_best(best: Mapping[str, Tensor], weights: TrainedWeights) -> None:
    """Check the parameters of the best validation, which are used after the last step only.

    Raises:
        ValueError: they are not those of the model.
    """
    trained = {name: tuple(p.shape) for name, p in weights.model.named_parameters() if p.requires_grad}
    if best and {name: tuple(tensor.shape) for name, tensor in best.items()} != trained:
        raise ValueError("the parameters of the best validation are not those of this model")
    if not all(tensor.isfinite().all() for tensor in best.values() if tensor.is_floating_point()):
        raise ValueError("the parameters of the best validation are not finite")


def _open(path: Path) -> ResumedRun:
    """Open a run checkpoint.

    Raises:
        UserError: its state, its config or its trained weights are not whole.
    """
    state, config = read_state(path), _read_config(path)
    try:
        files = [file for name in RESULTS for file in (path / name).glob("*.safetensors")]
        if not any(tensors_of_file(file) for file in files):
            raise UserError("it has no trained weights")
        stored = state.get("weights") or {}
        found = {
            name: digest
            for folder in {file.parent for file in files}
            for name, digest in weights_digests(folder).items()
        }
        if damaged := [name for name, digest in stored.items() if found.get(name) != digest]:
            raise UserError(f"{damaged[0]} is not the file that was written with it")
    except UserError as error:
        raise UserError(f"resume_from_checkpoint: {str(path)!r} is not a whole checkpoint ({error})") from None
    return ResumedRun(path, state, config)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(read_text(path / RUN_CONFIG_NAME, MOST_YAML_BYTES))
        if not isinstance(values, dict) or not values.keys() >= {*RUN_CONFIG_KEYS, *_BATCH_KEYS}:
            raise ValueError("it is not the config of a run")
        if not all(type(values[key]) is int and values[key] > 0 for key in _BATCH_KEYS):
            raise ValueError(f"{' and '.join(_BATCH_KEYS)} are not numbers of rows and forwards")
    except (OSError, ValueError) as error:
        raise UserError(f"resume_from_checkpoint: {str(path / RUN_CONFIG_NAME)!r} cannot be read ({error})") from None
    rename_components(values)
    return flat_config(values)


def _is_default(key: str, value: Any, settings_type: type[Settings]) -> bool:
    """Tell whether a value, of a key or passed on to a node by that name, is the setting's default."""
    field = settings_type.model_fields.get(key.rpartition(".")[2])
    return field is not None and not field.is_required() and field.get_default() == value
