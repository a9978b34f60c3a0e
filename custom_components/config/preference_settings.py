"""Settings of the recipe that learns preferences."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from custom_components.config.component_trials import try_preference_loss
from custom_components.config.lora_settings import LoRASettings
from custom_components.config.settings import DATASET, ComponentNode, Count

PAIRS = replace(
    DATASET,
    ours="custom_components.datasets.preference_dataset",
    attributes=(*DATASET.attributes, "with_reference", "distinct"),
    of_other_recipes={"custom_components.datasets.chat_dataset": "recipes/lora_single_device.py"},
)
PREFERENCE_LOSS = ComponentNode(
    "custom_components.training.preference_losses.sigmoid", supplied=("answers",), trial=try_preference_loss
)
_LOSSES = PREFERENCE_LOSS.ours.rpartition(".")[0]


class PreferenceSettings(LoRASettings):
    """Settings of recipes/lora_dpo_single_device.py."""

    num_row_dialogs: ClassVar[int] = 2

    dataset: Annotated[dict[str, Any], PAIRS]
    dataset_val: Annotated[dict[str, Any] | None, PAIRS] = None
    loss: Annotated[dict[str, Any], PREFERENCE_LOSS]
    loss_chunk_size: Count = 512

    @classmethod
    def is_for(cls, values: Mapping[str, Any]) -> bool:
        """Tell by its keys whether a config is for this recipe."""
        nodes = {key: values.get(key) for key in ("dataset", "loss")}
        paths = {key: str(node.get("_component_")) for key, node in nodes.items() if isinstance(node, Mapping)}
        return (
            "loss_chunk_size" in values
            or paths.get("dataset") == PAIRS.ours
            or paths.get("loss", "").startswith(f"{_LOSSES}.")
        )

    @property
    def position_loss(self) -> dict[str, Any]:
        return {
            "_component_": "custom_components.training.loss.LinearCrossEntropy",
            "chunk_size": self.loss_chunk_size,
        }

    @property
    def preference_loss(self) -> str:
        """The loss's name, without its path where it is one of ours."""
        return self.loss["_component_"].removeprefix(f"{_LOSSES}.")

    def training_hyperparameters(self) -> dict[str, object]:
        of_loss = {f"loss.{key}": value for key, value in self.loss.items() if key != "_component_"}
        return {**super().training_hyperparameters(), "loss": self.preference_loss, **of_loss}

    def notes(self) -> Iterator[str]:
        yield from super().notes()
        if self.init_adapter_from is not None and self.lora_dropout > 0:
            yield (
                f"lora_dropout {self.lora_dropout}: the reference, the adapter in init_adapter_from, is without "
                "dropout, so the two differ from the first step on; 0 is usual"
            )
        if self.neftune_noise_alpha is not None:
            yield (
                f"neftune_noise_alpha {self.neftune_noise_alpha}: the reference is without noise, so the two differ "
                "from the first step on; null is usual"
            )

    def combination_problems(self) -> Iterator[tuple[str, str]]:
        if self.train_on == "all":
            yield "train_on", "all: the prompt is the same for both answers of a pair; set assistant or last_assistant"
        yield from super().combination_problems()
