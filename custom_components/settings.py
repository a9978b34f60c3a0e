"""What each recipe reads: every key with its type, range and default. The only home of a default.

configs/*.yaml name every key and say its effect; tests hold the two together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt

PathText = Annotated[Path, AfterValidator(Path.expanduser)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
DtypeName = Literal["auto", "bf16", "fp16", "fp32"]
# Hugging Face's names of the attention projections are taken as well as torchtune's.
AttentionModule = Literal["q_proj", "k_proj", "v_proj", "output_proj", "o_proj"]


@dataclass(frozen=True)
class ComponentNode:
    """Marks a field as a node with a `_component_`; `supplied` names the arguments that the recipe adds."""

    supplied: tuple[str, ...] = ()


class Settings(BaseModel):
    """The base of all settings: unknown keys and wrong types are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def combination_problems(self) -> Iterator[tuple[str, str]]:
        """Keys whose values are right apart and wrong together, each with a message."""
        return iter(())


class TrainingSettings(Settings):
    """What recipes/lora_single_device.py reads."""

    checkpoint_dir: PathText
    output_dir: PathText
    overwrite_output_dir: bool = False
    resume_from_checkpoint: bool | str = False
    init_adapter_from: PathText | None = None

    lora_rank: PositiveInt
    lora_alpha: Annotated[float, Field(gt=0)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    lora_attn_modules: list[AttentionModule]
    apply_lora_to_mlp: bool
    apply_lora_to_output: bool = False
    use_dora: bool = False
    use_rslora: bool = False
    quantize_base: bool
    model: Annotated[dict[str, Any], ComponentNode()]

    max_seq_len: Annotated[int, Field(ge=8)] | None = None
    prompt_template: str | dict[str, str] = "llama2"
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    tokenizer: Annotated[dict[str, Any], ComponentNode()]
    on_overlong: Literal["truncate", "drop", "error"] = "truncate"
    on_bad_row: Literal["error", "skip"] = "error"
    cache_dir: PathText | None = Path("~/.cache/llama-lora-recipes")
    dataset: Annotated[dict[str, Any], ComponentNode(supplied=("tokenizer",))]
    dataset_val: Annotated[dict[str, Any] | None, ComponentNode(supplied=("tokenizer",))] = None
    val_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    run_val_every_n_steps: PositiveInt | None = None
    packed: bool = False
    group_by_length: bool = False
    shuffle: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**43)] = 0

    epochs: PositiveInt
    max_steps_per_epoch: PositiveInt | None = None
    batch_size: PositiveInt
    gradient_accumulation_steps: PositiveInt
    optimizer: Annotated[dict[str, Any], ComponentNode(supplied=("params",))]
    lr_scheduler: Annotated[dict[str, Any], ComponentNode(supplied=("step", "num_steps", "num_warmup_steps"))]
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    warmup_steps: NonNegativeInt | None = None
    lora_plus_ratio: Annotated[float, Field(gt=0)] | None = None
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = None
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = None
    early_stopping_patience: PositiveInt | None = None
    save_every_n_steps: PositiveInt | None = None
    keep_last_n_checkpoints: PositiveInt = 2
    loss: Annotated[dict[str, Any], ComponentNode()]

    device: Device = "auto"
    dtype: DtypeName = "auto"
    enable_activation_checkpointing: bool = False
    verify_base: bool = False

    log_every_n_steps: PositiveInt = 1
    metric_logger: Annotated[dict[str, Any] | None, ComponentNode()] = None
    sample_prompts: list[str] = []

    def combination_problems(self) -> Iterator[tuple[str, str]]:
        if not (self.lora_attn_modules or self.apply_lora_to_mlp or self.apply_lora_to_output):
            yield (
                "lora_attn_modules",
                "[] with apply_lora_to_mlp and apply_lora_to_output false leaves nothing to train",
            )
        if self.warmup_steps is not None and self.warmup_ratio > 0:
            yield (
                "warmup_steps",
                f"{self.warmup_steps} beside warmup_ratio {self.warmup_ratio}: set one of them to null or 0",
            )
        if "lr" not in self.optimizer:
            yield "optimizer.lr", "missing: the peak learning rate has no default"
        if self.packed and self.group_by_length:
            yield "group_by_length", "true beside packed: a pack holds rows of all lengths; set one of the two to false"
        if self.dataset_val is not None and self.val_fraction is not None:
            yield "val_fraction", f"{self.val_fraction} beside dataset_val: validate on one of the two"
        if self.run_val_every_n_steps is not None and self.dataset_val is None and self.val_fraction is None:
            yield "run_val_every_n_steps", "there is nothing to validate on; set dataset_val or val_fraction"
        if self.early_stopping_patience is not None and self.dataset_val is None and self.val_fraction is None:
            yield "early_stopping_patience", "there is nothing to validate on; set dataset_val or val_fraction"


class PreviewSettings(TrainingSettings):
    """What recipes/preview.py reads: a training config, and which rows to show."""

    row: NonNegativeInt | None = None
    num_rows: PositiveInt = 3


class GenerationSettings(Settings):
    """What recipes/generate.py reads."""

    checkpoint_dir: PathText
    adapter_dir: PathText | None = None
    prompt: str
    system_prompt: str | None = None
    prompt_template: str | dict[str, str] | None = None
    compare: bool = False
    max_new_tokens: PositiveInt = 200
    temperature: NonNegativeFloat = 0.0
    top_k: PositiveInt | None = None
    seed: NonNegativeInt = 0
    quantize_base: bool = False
    device: Device = "auto"
    dtype: DtypeName = "auto"

    def combination_problems(self) -> Iterator[tuple[str, str]]:
        if self.compare and self.adapter_dir is None:
            yield "compare", "true needs an adapter_dir to compare the base with"
