"""Settings of full fine-tuning."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import Field, PositiveInt

from custom_components.config.settings import ComponentNode
from custom_components.config.training_settings import RunPaths, TrainingSettings

FULL_MODEL = ComponentNode(
    "custom_components.models.llama_from_config", methods={"forward": 1}, attributes=("layers", "output")
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
    keep_last_n_checkpoints: PositiveInt = 1

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
