"""All that stays the same from the first step of a training run to its last."""

import functools
from dataclasses import dataclass

import torch

from custom_components.config.reading import config_text
from custom_components.config.training_settings import TrainingSettings
from custom_components.runs.checkpoints import BesideWeights
from custom_components.runs.run_directory import RunDirectory
from custom_components.runtime.process_memory import PeakMemory
from custom_components.transforms.prompt_format import PromptFormat
from custom_components.weights.checkpoint_files import BaseCheckpoint


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        settings: with nothing left to choose: `batch_size` is a number.
        base: the checkpoint that is trained on.
        prompt_format: that the rows have.
        dtype: of the computation.
        directory: where its results are written.
        memory: measured since the start of the program.
    """

    settings: TrainingSettings
    base: BaseCheckpoint
    prompt_format: PromptFormat
    device: torch.device
    dtype: torch.dtype
    directory: RunDirectory
    memory: PeakMemory

    @functools.cached_property
    def beside(self) -> BesideWeights:
        """What is saved beside the adapter's weights."""
        return BesideWeights(self.base.name, self.prompt_format.texts(), config_text(self.settings))
