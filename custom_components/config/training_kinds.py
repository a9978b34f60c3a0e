"""Settings of the recipes that take the config of any training recipe."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt, create_model

from custom_components.config.distributed_settings import DistributedSettings
from custom_components.config.full_settings import FullSettings
from custom_components.config.preference_settings import PreferenceSettings
from custom_components.config.settings import PathText, Settings
from custom_components.config.training_settings import TrainingSettings


def training_kind(values: Mapping[str, Any]) -> type[TrainingSettings]:
    """Tell by its keys which recipe a training config is for, and give that recipe's settings."""
    if PreferenceSettings.is_for(values):
        return PreferenceSettings
    if not any(key.startswith("lora_") for key in values):
        return FullSettings
    return DistributedSettings  # the keys of one device, and two more


class AnyTrainingSettings(TrainingSettings):
    """Settings that are read of a training config of any kind."""

    @classmethod
    def for_config(cls, values: Mapping[str, Any]) -> type[Settings]:
        return training_kind(values)


class _Devices(Settings):
    nproc_per_node: PositiveInt = Field(
        1, description="devices that train together; more than one: the memory of each, replicated and sharded"
    )


class EstimateSettings(AnyTrainingSettings, _Devices):
    """Settings of recipes/estimate.py: a training config, and for how many devices."""

    @classmethod
    def for_config(cls, values: Mapping[str, Any]) -> type[Settings]:
        return create_model(cls.__name__, __base__=(super().for_config(values), _Devices))


class _RowsShown(Settings):
    row: NonNegativeInt | None = Field(
        None,
        description="this row of the files alone, counted from 0, with its table of ids and labels; null: the first",
    )
    num_rows: PositiveInt = Field(3, description="how many of the first rows to show")
    output_file: PathText | None = Field(None, description="also write what is shown as a page with colours, HTML")


class PreviewSettings(TrainingSettings, _RowsShown):
    """Settings of recipes/preview.py: a training config, and which rows to show."""

    @classmethod
    def for_config(cls, values: Mapping[str, Any]) -> type[Settings]:
        return create_model(cls.__name__, __base__=(training_kind(values), _RowsShown))
