"""Settings of the training recipes: every key with its type, range and default."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from custom_components.config.component_trials import find_logger_package, try_loss, try_optimizer, try_schedule
from custom_components.config.settings import (
    DATASET,
    TOKENIZER,
    ComponentNode,
    Count,
    CountOrZero,
    Device,
    DtypeName,
    PathText,
    Settings,
    Words,
    path_text,
)
from custom_components.runtime.errors import UserError

if TYPE_CHECKING:  # note: it takes seconds, and `--help` is to come at once
    import torch

_PositiveNumber = Annotated[float, Field(gt=0, le=1e6)]
# Of a step; of more, the list of them would fill the memory.
_MOST_ROWS = 2**31
_OPTIMIZER_KEYS = ("lr", "weight_decay", "betas", "eps")

_BUILDERS = "custom_components.models."
# The same with adapters has `lora_` before its name.
BUILDERS_WITHOUT_ADAPTERS = [
    _BUILDERS + name for name in ("llama_from_config", "llama2_7b", "llama2_13b", "llama2_70b")
]
MODEL = ComponentNode(
    f"{_BUILDERS}lora_llama_from_config",
    methods={"forward": 1},
    attributes=("layers", "output"),
    of_other_recipes=dict.fromkeys(BUILDERS_WITHOUT_ADAPTERS, "recipes/full_single_device.py"),
    counterparts={path: path.replace(_BUILDERS, f"{_BUILDERS}lora_") for path in BUILDERS_WITHOUT_ADAPTERS},
)
OPTIMIZER = ComponentNode(
    "torch.optim.AdamW",
    supplied=("params",),
    libraries=("torch.optim.", "torchao.optim.", "bitsandbytes.optim."),
    methods={"step": 0, "zero_grad": 0, "state_dict": 0},
    trial=try_optimizer,
)
LR_SCHEDULER = ComponentNode(
    "custom_components.training.schedules.cosine",
    supplied=("step", "num_steps", "num_warmup_steps"),
    methods={"__float__": 0},
    trial=try_schedule,
)
LOSS = ComponentNode("custom_components.training.loss.LinearCrossEntropy", methods={"__call__": 3}, trial=try_loss)
METRIC_LOGGER = ComponentNode(
    "torchtune.training.metric_logging.TensorBoardLogger",
    libraries=("torchtune.training.metric_logging.",),
    methods={"log_dict": 2, "close": 0},
    trial=find_logger_package,
)


class RunPaths(Settings):
    """Where a training run reads and writes."""

    checkpoint_dir: PathText
    output_dir: PathText
    overwrite_output_dir: bool = False
    resume_from_checkpoint: bool | Annotated[str, AfterValidator(path_text)] = False


class TrainingSettings(RunPaths):
    """What all training recipes have in common.

    Attributes:
        result_name: the name of the directory of the trained weights, in output_dir and in each checkpoint.
    """

    alternatives = (("warmup_steps", "warmup_ratio"), ("dataset_val", "val_fraction"))
    # The dialogs of a row.
    num_row_dialogs: ClassVar[int] = 1
    result_name: ClassVar[str] = "adapter"

    model: Annotated[dict[str, Any], MODEL]

    max_seq_len: Annotated[int, Field(ge=8, le=2**40)] | None = None
    prompt_template: str | dict[str, str] = "llama2"
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    tokenizer: Annotated[dict[str, Any], TOKENIZER]
    on_overlong: Literal["truncate", "drop", "error"] = "truncate"
    on_bad_row: Literal["error", "skip"] = "error"
    on_uneven_turns: Literal["error", "merge", "drop_leading"] = "error"
    on_empty_answer: Literal["drop", "error"] = "drop"
    cache_dir: PathText | None = Path("~/.cache/llama-lora-recipes")
    dataset: Annotated[dict[str, Any], DATASET]
    dataset_val: Annotated[dict[str, Any] | None, DATASET] = None
    val_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    run_val_every_n_steps: Count | None = None
    packed: bool = False
    group_by_length: bool = False
    shuffle: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**43)] = 0

    epochs: Annotated[Annotated[int, Field(gt=0, le=10**6)] | _PositiveNumber, Words("number > 0")]
    max_steps_per_epoch: Count | None = None
    max_steps: Count | None = None
    batch_size: Annotated[int, Field(gt=0, le=_MOST_ROWS)] | Literal["auto"]
    gradient_accumulation_steps: Annotated[int, Field(gt=0, le=_MOST_ROWS)]
    learning_rate: _PositiveNumber | None = None
    optimizer: Annotated[dict[str, Any], OPTIMIZER]
    lr_scheduler: Annotated[dict[str, Any], LR_SCHEDULER]
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    warmup_steps: CountOrZero | None = None
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = None
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = None
    early_stopping_patience: Count | None = None
    save_every_n_steps: Count | None = None
    save_every_minutes: Annotated[float, Field(gt=0)] | None = 30.0
    keep_last_n_checkpoints: Count = 2
    loss: Annotated[dict[str, Any], LOSS]

    device: Device = "auto"
    dtype: DtypeName = "auto"
    compile: bool | Literal["auto"] = "auto"
    enable_activation_checkpointing: bool | Literal["auto"] = "auto"
    enable_activation_offloading: bool | Literal["auto"] = "auto"

    log_every_n_steps: Count = 1
    metric_logger: Annotated[dict[str, Any] | None, METRIC_LOGGER] = None
    sample_prompts: list[str] = []

    @property
    def position_loss(self) -> dict[str, Any]:
        """The node of what computes the losses of supervised positions."""
        return self.loss

    @property
    def frees_gradients(self) -> bool:
        """Whether the backward frees each gradient when it is complete, because the optimizer has used it."""
        return False

    def training_hyperparameters(self) -> dict[str, object]:
        """Name what shaped the training, by keys of the config; None: no effect. The weights' sizes are not of it."""
        return {
            "epochs": self.epochs,
            "max_steps_per_epoch": self.max_steps_per_epoch,
            "max_steps": self.max_steps,
            "batch_size": self.batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "packed": self.packed or None,
            "max_seq_len": self.max_seq_len,
            "optimizer": self.optimizer["_component_"].rpartition(".")[2],
            **{f"optimizer.{key}": value for key, value in self.optimizer.items() if key in _OPTIMIZER_KEYS},
            "lr_scheduler": self.lr_scheduler["_component_"].rpartition(".")[2],
            "warmup_steps": self.warmup_steps,
            "warmup_ratio": self.warmup_ratio or None,
            "neftune_noise_alpha": self.neftune_noise_alpha,
            "clip_grad_norm": self.clip_grad_norm,
            "seed": self.seed,
        }

    def notes(self) -> Iterator[str]:
        of_tokenizer, of_dataset = self.tokenizer.get("system_prompt"), self.dataset.get("system_prompt")
        if None not in (of_tokenizer, of_dataset) and of_tokenizer != of_dataset:
            yield (
                "dataset.system_prompt is used for rows without one of their own, tokenizer.system_prompt "
                f"{of_tokenizer!r} is not"
            )
        trained, validated = of_dataset or of_tokenizer, (self.dataset_val or {}).get("system_prompt")
        if validated is not None and validated != trained:
            yield f"dataset_val.system_prompt {validated!r} is not the one that is trained with, {trained!r}"

    def combination_problems(self) -> Iterator[tuple[str, str]]:
        if self.warmup_steps is not None and self.warmup_ratio > 0:
            yield (
                "warmup_steps",
                f"{self.warmup_steps} beside warmup_ratio {self.warmup_ratio}: set one of them to null or 0",
            )
        if "lr" not in self.optimizer:
            yield "optimizer.lr", "missing: the peak learning rate has no default; write ${learning_rate}"
        elif self.learning_rate not in (None, self.optimizer["lr"]):
            yield (
                "learning_rate",
                f"{self.learning_rate} beside optimizer.lr {self.optimizer['lr']}: write ${{learning_rate}} there, or "
                "give one of them",
            )
        if self.packed and self.group_by_length:
            yield "group_by_length", "true beside packed: a pack holds rows of all lengths; set one of the two to false"
        if self.enable_activation_offloading is True and self.enable_activation_checkpointing is False:
            yield (
                "enable_activation_offloading",
                "true moves the inputs of recomputed layers, and enable_activation_checkpointing is false; set that to "
                "auto, or this",
            )
        if self.dataset_val is not None and self.val_fraction is not None:
            yield "val_fraction", f"{self.val_fraction} beside dataset_val: validate on one of the two"
        if self.run_val_every_n_steps is not None and self.dataset_val is None and self.val_fraction is None:
            yield "run_val_every_n_steps", "there is nothing to validate on; set dataset_val or val_fraction"
        if self.early_stopping_patience is not None and self.dataset_val is None and self.val_fraction is None:
            yield "early_stopping_patience", "there is nothing to validate on; set dataset_val or val_fraction"


def refuse_cuda_only_settings(settings: TrainingSettings, device: "torch.device") -> None:
    """Refuse settings that have no effect on the CPU there.

    bitsandbytes' paged optimizers page between CUDA and host memory, and on the CPU would warn and not page;
    offloading moves activations to the host's memory.

    Raises:
        UserError: for such a setting on the CPU.
    """
    component = settings.optimizer["_component_"]
    if device.type == "cpu" and component.rpartition(".")[2].startswith("Paged"):
        raise UserError(f"optimizer._component_: {component} needs CUDA; on the CPU use torch.optim.AdamW or AdamW8bit")
    if device.type == "cpu" and settings.enable_activation_offloading is True:
        raise UserError("enable_activation_offloading: true needs CUDA; on the CPU set it to auto")
