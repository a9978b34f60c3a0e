"""Settings of full fine-tuning."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import Field

from custom_components.config.settings import ComponentNode, Count
from custom_components.config.training_settings import BUILDERS_WITHOUT_ADAPTERS, RunPaths, TrainingSettings

_SIZES = ("llama2_7b", "llama2_13b", "llama2_70b")
_WITH_ADAPTERS = [
    *(f"custom_components.models.{kind}_{size}" for kind in ("lora", "qlora") for size in _SIZES),
    *(f"custom_components.models.lora_{name}" for name in ("llama_from_config", "code_llama2_7b", "open_llama_3b")),
    *(f"custom_components.models.lora_{name}" for name in ("llama3_8b", "llama3_1_8b", "llama3_2_1b", "llama3_2_3b")),
    *(f"custom_components.models.lora_{name}" for name in ("tinyllama_1b", "mistral_7b")),
]
FULL_MODEL = ComponentNode(
    "custom_components.models.llama_from_config",
    methods={"forward": 1},
    attributes=("layers", "output"),
    of_other_recipes=dict.fromkeys(_WITH_ADAPTERS, "recipes/lora_single_device.py"),
    counterparts={
        path: plain for path in _WITH_ADAPTERS if (plain := re.sub("q?lora_", "", path)) in BUILDERS_WITHOUT_ADAPTERS
    },
)


class TrainedWeightsKeys(RunPaths):
    """The weights that are trained."""

    train_only: list[str] | None = None


class FullSettings(TrainingSettings, TrainedWeightsKeys):
    """Settings of recipes/full_single_device.py."""

    result_name: ClassVar[str] = "model"

    model: Annotated[dict[str, Any], FULL_MODEL]
    optimizer_in_backward: bool = False
    # A checkpoint of 7B takes 27 GB.
    save_every_minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    keep_last_n_checkpoints: Count = 1

    @property
    def frees_gradients(self) -> bool:
        return self.optimizer_in_backward

    def training_hyperparameters(self) -> dict[str, object]:
        return {
            "train_only": self.train_only,
            **super().training_hyperparameters(),
            "optimizer_in_backward": self.optimizer_in_backward or None,
        }

    def combination_problems(self) -> Iterator[tuple[str, str]]:
        if self.train_only is not None and "train_only" not in self.model:
            yield "train_only", "does not reach the model; write train_only: ${train_only} in its node"
        if self.optimizer_in_backward:
            yield from self._refused_in_backward()
        yield from super().combination_problems()

    def _refused_in_backward(self) -> Iterator[tuple[str, str]]:
        key, takes = "optimizer_in_backward", "true: each weight takes its step when its gradient is there"
        if self.gradient_accumulation_steps > 1:
            number = self.gradient_accumulation_steps
            yield key, f"{takes}, not after {number} forwards; set gradient_accumulation_steps=1, or false"
        if self.clip_grad_norm is not None:
            yield key, f"{takes}, before the norm of all is known; set clip_grad_norm=null, or false"
        if self.dtype == "fp16":
            yield key, f"{takes}, and fp16 may have to take it back; set dtype=bf16 or fp32, or false"
