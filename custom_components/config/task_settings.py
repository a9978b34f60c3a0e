"""Settings of generate, evaluate, merge and compare_runs.py: every key with its type, range and default."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from custom_components.config.settings import (
    DATASET,
    Count,
    CountOrZero,
    Device,
    DtypeName,
    PathText,
    QuantizationName,
    Settings,
    path_text,
    quantization_problems,
)


class GenerationSettings(Settings):
    """Settings of recipes/generate.py."""

    checkpoint_dir: PathText
    adapter_dir: PathText | None = None
    prompt: str = ""
    prompts_file: PathText | None = None
    output_file: PathText | None = None
    chat: bool = False
    system_prompt: str | None = None
    prompt_template: str | dict[str, str] | None = None
    compare: bool = False
    batch_size: Count = 8
    max_new_tokens: Count = 200
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    top_k: Count | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    # Beyond these, and at lower temperatures, fp32 logits become infinite.
    repetition_penalty: Annotated[float, Field(ge=0.001, le=1000)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**43)] = 0
    num_answers: Annotated[int, Field(gt=0, le=10_000)] = 1
    quantize_base: bool = False
    quantization: QuantizationName | None = None
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
        if self.num_answers > 1 and self.temperature == 0:
            yield "num_answers", f"{self.num_answers} at temperature 0 are all the same answer; set a temperature"
        if self.num_answers > 1 and self.chat:
            yield "num_answers", f"{self.num_answers} beside chat: a chat continues from one answer; set 1"
        if self.compare and self.chat:
            yield "compare", "true beside chat: base and adapter cannot both be talked to; set one of them to false"
        for key in ("compare", "fold_adapter"):
            if getattr(self, key) and self.adapter_dir is None:
                yield key, "true needs an adapter_dir"
        if self.fold_adapter and self.compare:
            yield "fold_adapter", "true beside compare: a folded adapter cannot be taken away; set one of them to false"
        yield from quantization_problems(self.quantize_base, self.quantization)
        if self.fold_adapter and self.quantize_base:
            yield (
                "fold_adapter",
                "true beside quantize_base: 4-bit weights cannot take it up; set one of them to false",
            )
        if self.fold_adapter and self.quantization not in (None, "none"):
            yield (
                "fold_adapter",
                f"true beside quantization {self.quantization}: quantized weights cannot take it up; set it to false",
            )


class EvaluationSettings(Settings):
    """Settings of recipes/evaluate.py."""

    checkpoint_dir: PathText
    adapter_dir: PathText | None = None
    compare: bool = True
    output_file: PathText | None = None

    max_seq_len: Annotated[int, Field(ge=8, le=2**40)] | None = None
    system_prompt: str | None = None
    prompt_template: str | dict[str, str] | None = None
    on_overlong: Literal["truncate", "drop", "error"] = "truncate"
    on_bad_row: Literal["error", "skip"] = "error"
    on_uneven_turns: Literal["error", "merge", "drop_leading"] = "error"
    on_empty_answer: Literal["drop", "error"] = "drop"
    cache_dir: PathText | None = Path("~/.cache/llama-lora-recipes")
    dataset: Annotated[dict[str, Any] | None, DATASET] = None
    val_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**43)] = 0
    batch_size: Count = 4

    generate_answers: CountOrZero = 0
    max_new_tokens: Count = 200

    tasks: list[Annotated[str, AfterValidator(path_text)]] = []
    num_fewshot: CountOrZero | None = None
    max_task_rows: Count | None = None
    apply_chat_template: bool = False

    quantize_base: bool = False
    quantization: QuantizationName | None = None
    device: Device = "auto"
    dtype: DtypeName = "auto"

    def combination_problems(self) -> Iterator[tuple[str, str]]:
        yield from quantization_problems(self.quantize_base, self.quantization)
        if self.dataset is None and not self.tasks:
            yield "dataset", "null without tasks leaves nothing to evaluate; name one of the two"
        if self.apply_chat_template and not self.tasks:
            yield "apply_chat_template", "true without tasks: rows of a dataset are dialogs anyway; set it to false"
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
    """Settings of recipes/merge.py."""

    checkpoint_dir: PathText
    adapter_dir: PathText | None = None
    adapters: list[WeightedAdapter] = []
    base: Literal["original", "dequantized"] = "original"
    allow_merged_base: bool = False
    output_dir: PathText
    overwrite_output_dir: bool = False
    format: Literal["hugging_face", "gguf", "gguf_lora"] = "hugging_face"
    dtype: DtypeName = "auto"
    quantization: Literal["f16", "q8_0", "q5_k_m", "q4_k_m"] | None = None
    prove: bool = True

    def combination_problems(self) -> Iterator[tuple[str, str]]:
        if self.adapter_dir is None and not self.adapters and self.format != "gguf":
            yield (
                "adapter_dir",
                "null: name the adapter/ of a run, or several in adapters; format=gguf writes a model without one",
            )
        if self.adapter_dir is not None and self.adapters:
            yield "adapters", f"beside adapter_dir {str(self.adapter_dir)!r}: name one, or several, not both"
        if self.quantization is not None and self.format != "gguf":
            yield "quantization", f"{self.quantization!r} is of GGUF files; set format=gguf, or quantization=null"
        if self.dtype != "auto" and self.format != "hugging_face":
            yield "dtype", f"{self.dtype!r} is of Hugging Face directories; for a GGUF file set quantization"
        if self.format == "gguf_lora" and (self.adapters or self.base != "original"):
            key = "adapters" if self.adapters else "base"
            yield key, "format=gguf_lora writes one adapter as it is; for a merge set format=gguf"

    @property
    def weighted_adapters(self) -> list[WeightedAdapter]:
        """List the adapters, one or several."""
        return [WeightedAdapter(dir=self.adapter_dir)] if self.adapter_dir is not None else self.adapters

    @property
    def gguf_quantization(self) -> Literal["f16", "q8_0", "q5_k_m", "q4_k_m"]:
        return self.quantization or "f16"


class ComparisonSettings(Settings):
    """Settings of recipes/compare_runs.py."""

    run_dirs: Annotated[list[PathText], Field(min_length=1)]
    evaluations: list[PathText] = []
    output_file: PathText | None = None
