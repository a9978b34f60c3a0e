"""All that stays the same from the first step of a training run to its last."""

import functools
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from custom_components.config.reading import config_text
from custom_components.config.training_settings import TrainingSettings
from custom_components.runs.run_directory import RunDirectory
from custom_components.runs.trained_weights import TrainedWeights
from custom_components.runtime.process_memory import PeakMemory

SettingsType_co = TypeVar("SettingsType_co", bound=TrainingSettings, covariant=True)


@dataclass(frozen=True)
class Run(Generic[SettingsType_co]):
    """A training run.

    Attributes:
        settings: with nothing left to choose: `batch_size` is a number.
        weights: that are trained.
        dtype: of the computation.
        directory: where its results are written.
        memory: measured since the start of the program.
    """

    settings: SettingsType_co
    weights: TrainedWeights
    device: torch.device
    dtype: torch.dtype
    directory: RunDirectory
    memory: PeakMemory

    @functools.cached_property
    def config(self) -> str:
        """The text of the run's config.yaml."""
        return config_text(self.settings)
