"""Settings of the recipes that train an adapter."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from custom_components.config.settings import (
    AttentionModule,
    CountOrZero,
    PathText,
    QuantizationName,
    Rank,
    quantization_problems,
)
from custom_components.config.training_settings import RunPaths, TrainingSettings
from custom_components.runtime.patterns import checked_pattern

_Pattern = Annotated[str, AfterValidator(checked_pattern)]


class AdapterKeys(RunPaths):
    """The adapter, and the base it is on."""

    init_adapter_from: PathText | None = None
    lora_rank: Rank
    lora_alpha: Annotated[float, Field(gt=0)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    lora_attn_modules: list[AttentionModule]
    apply_lora_to_mlp: bool
    apply_lora_to_output: bool = False
    use_dora: bool = False
    use_rslora: bool = False
    init_lora_weights: Literal["pissa"] | None = None
    rank_pattern: dict[_Pattern, Rank] | None = None
    alpha_pattern: dict[_Pattern, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    layers_to_transform: list[CountOrZero] | None = None
    trainable_tokens: list[Annotated[str, Field(min_length=1)]] | None = None
    quantize_base: bool
    quantization: QuantizationName | None = None


class LoRASettings(TrainingSettings, AdapterKeys):
    """Settings of recipes/lora_single_device.py."""

    lora_plus_ratio: Annotated[float, Field(gt=0)] | None = None
    quantized_cache: bool = False
    verify_base: bool = False

    @property
    def quantized_cache_dir(self) -> Path | None:
        """Give the directory where the quantized base is kept for the next start; None: it is not kept."""
        return self.cache_dir if self.quantized_cache else None

    @property
    def preference_loss(self) -> str | None:
        """The name of the loss of pairs of answers; None: the recipe trains on single answers."""
        return None

    def training_hyperparameters(self) -> dict[str, object]:
        return {
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "layers_to_transform": self.layers_to_transform,
            "trainable_tokens": self.trainable_tokens,
            "init_lora_weights": self.init_lora_weights
            and f"{self.init_lora_weights}: lora_rank is that on disk, twice the {self.lora_rank} that were trained",
            **super().training_hyperparameters(),
            "lora_plus_ratio": self.lora_plus_ratio,
        }

    def combination_problems(self) -> Iterator[tuple[str, str]]:
        if not (self.lora_attn_modules or self.apply_lora_to_mlp or self.apply_lora_to_output):
            yield (
                "lora_attn_modules",
                "[] with apply_lora_to_mlp and apply_lora_to_output false leaves nothing to train",
            )
        if self.init_lora_weights and self.use_dora:
            yield "init_lora_weights", f"{self.init_lora_weights} beside use_dora true: set one of them only"
        if self.init_lora_weights and self.init_adapter_from is not None:
            yield "init_lora_weights", "pissa beside init_adapter_from, which has its own values: set one of them only"
        yield from quantization_problems(self.quantize_base, self.quantization)
        for key in ("rank_pattern", "alpha_pattern", "layers_to_transform", "quantization", "init_lora_weights"):
            if getattr(self, key) is not None and key not in self.model:
                yield key, f"does not reach the model; write {key}: ${{{key}}} in its node"
        if self.trainable_tokens is not None and "trainable_tokens" not in self.tokenizer:
            yield "trainable_tokens", "does not reach the tokenizer; write ${trainable_tokens} in its node"
        if self.trainable_tokens and self.apply_lora_to_output:
            yield "trainable_tokens", "beside apply_lora_to_output true: rows of the output head or all of it, not both"
        if len({*(self.trainable_tokens or ())}) < len(self.trainable_tokens or ()):
            yield "trainable_tokens", f"{self.trainable_tokens} has a token twice"
        if self.quantized_cache and self.cache_dir is None:
            yield "quantized_cache", "true without a cache_dir: there is nowhere to keep the base"
        yield from super().combination_problems()
