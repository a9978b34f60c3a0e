"""What each recipe reads: every key with its type, range and default. The only home of a default.

configs/*.yaml name every key and say its effect; tests hold the two together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

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
    batch_size: PositiveInt | Literal["auto"]
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
    compile: bool | Literal["auto"] = "auto"
    enable_activation_checkpointing: bool | Literal["auto"] = "auto"
    enable_activation_offloading: bool = False
    quantized_cache: bool = False
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
        if self.quantized_cache and self.cache_dir is None:
            yield "quantized_cache", "true without a cache_dir: there is nowhere to keep the base"
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
    prompt: str = ""
    prompts_file: PathText | None = None
    output_file: PathText | None = None
    chat: bool = False
    system_prompt: str | None = None
    prompt_template: str | dict[str, str] | None = None
    compare: bool = False
    batch_size: PositiveInt = 8
    max_new_tokens: PositiveInt = 200
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    top_k: PositiveInt | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    # Beyond these, and at lower temperatures, fp32 logits become infinite.
    repetition_penalty: Annotated[float, Field(ge=0.001, le=1000)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**43)] = 0
    quantize_base: bool = False
    fold_adapter: bool = False
    device: Device = "auto"
    dtype: DtypeName = "auto"

    def combination_problems(self) -> Iterator[tuple[str, str]]:
        asked = {"prompt": self.prompt != "", "prompts_file": self.prompts_file is not None, "chat": self.chat}
        if sum(asked.values()) > 1:
            yield "prompt", f"{' and '.join(key for key in asked if asked[key])} are given; give one of them"
        if (self.prompts_file is None) != (self.output_file is None):
            given, missing = sorted(["prompts_file", "output_file"], key=lambda key: getattr(self, key) is None)
            yield missing, f"missing beside {given}: questions are read from the one, answers written to the other"
        if 0 < self.temperature < 1e-3:
            yield "temperature", f"{self.temperature} is too low to draw by; set 0 for always the likeliest token"
        if self.compare and self.chat:
            yield "compare", "true beside chat: base and adapter cannot both be talked to; set one of them to false"
        for key in ("compare", "fold_adapter"):
            if getattr(self, key) and self.adapter_dir is None:
                yield key, "true needs an adapter_dir"
        if self.fold_adapter and self.compare:
            yield "fold_adapter", "true beside compare: a folded adapter cannot be taken away; set one of them to false"
        if self.fold_adapter and self.quantize_base:
            yield (
                "fold_adapter",
                "true beside quantize_base: 4-bit weights cannot take it up; set one of them to false",
            )


class EvaluationSettings(Settings):
    """What recipes/evaluate.py reads."""

    checkpoint_dir: PathText
    adapter_dir: PathText | None = None
    compare: bool = True
    output_file: PathText | None = None

    max_seq_len: Annotated[int, Field(ge=8)] | None = None
    system_prompt: str | None = None
    prompt_template: str | dict[str, str] | None = None
    on_overlong: Literal["truncate", "drop", "error"] = "truncate"
    on_bad_row: Literal["error", "skip"] = "error"
    cache_dir: PathText | None = Path("~/.cache/llama-lora-recipes")
    dataset: Annotated[dict[str, Any] | None, ComponentNode(supplied=("tokenizer",))] = None
    val_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**43)] = 0
    batch_size: PositiveInt = 4

    generate_answers: NonNegativeInt = 0
    max_new_tokens: PositiveInt = 200

    tasks: list[str] = []
    num_fewshot: NonNegativeInt | None = None
    max_task_rows: PositiveInt | None = None

    quantize_base: bool = False
    device: Device = "auto"
    dtype: DtypeName = "auto"

    def combination_problems(self) -> Iterator[tuple[str, str]]:
        if self.dataset is None and not self.tasks:
            yield "dataset", "null without tasks leaves nothing to evaluate; name one of the two"
        if self.dataset is None and self.generate_answers:
            yield "generate_answers", f"{self.generate_answers} without a dataset: there are no questions to answer"
        if self.dataset is None and self.val_fraction is not None:
            yield "val_fraction", f"{self.val_fraction} without a dataset: there are no rows to draw from"


class WeightedAdapter(BaseModel):
    """One of several adapters to merge, and the factor of its change to the weights."""

    model_config = ConfigDict(strict=True, frozen=True)

    dir: PathText
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0

    @model_validator(mode="before")
    @classmethod
    def has_only_these_keys(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not {"dir"} <= value.keys() <= {"dir", "weight"}:
            raise ValueError("a list of {dir: an adapter directory, weight: a number}")
        return value


class MergeSettings(Settings):
    """What recipes/merge.py reads."""

    checkpoint_dir: PathText
    adapter_dir: PathText | None = None
    adapters: list[WeightedAdapter] = []
    base: Literal["original", "dequantized"] = "original"
    allow_merged_base: bool = False
    output_dir: PathText
    overwrite_output_dir: bool = False
    format: Literal["hugging_face", "gguf"] = "hugging_face"
    dtype: DtypeName = "auto"
    quantization: Literal["f16", "q8_0"] | None = None
    prove: bool = True

    def combination_problems(self) -> Iterator[tuple[str, str]]:
        if self.adapter_dir is None and not self.adapters:
            yield "adapter_dir", "null: name the adapter/ of a run, or several in adapters"
        if self.adapter_dir is not None and self.adapters:
            yield "adapters", f"beside adapter_dir {str(self.adapter_dir)!r}: name one, or several, not both"
        if self.quantization is not None and self.format != "gguf":
            yield "quantization", f"{self.quantization!r} is of GGUF files; set format=gguf, or quantization=null"
        if self.dtype != "auto" and self.format == "gguf":
            yield "dtype", f"{self.dtype!r} is of Hugging Face directories; for a GGUF file set quantization"

    @property
    def weighted_adapters(self) -> list[WeightedAdapter]:
        """The adapters, one or several."""
        return [WeightedAdapter(dir=self.adapter_dir)] if self.adapter_dir is not None else self.adapters

    @property
    def gguf_quantization(self) -> Literal["f16", "q8_0"]:
        return self.quantization or "f16"
