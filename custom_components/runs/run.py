"""What stays the same from the first step of a training run to its last."""

from dataclasses import dataclass

import torch

from custom_components.config.training_settings import TrainingSettings
from custom_components.runs.checkpoints import BesideWeights
from custom_components.runs.run_directory import RunDirectory
from custom_components.runtime.process_memory import PeakMemory


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        settings: with nothing left to choose: `batch_size` is a number.
        dtype: of the computation.
        directory: where its results are written.
        beside: what is saved beside the adapter's weights.
        memory: measured since the start of the program.
    """

    settings: TrainingSettings
    device: torch.device
    dtype: torch.dtype
    directory: RunDirectory
    beside: BesideWeights
    memory: PeakMemory
