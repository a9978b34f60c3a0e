"""What a run trains, and how it is kept on disk."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from torchtune.modules import TransformerDecoder

from custom_components.weights.adapter_files import open_adapter
from custom_components.weights.adapters import load_adapter, save_adapter


class TrainedWeights(Protocol):
    """The trained weights of a run's model: an adapter's, or the model's own."""

    @property
    def name(self) -> str:
        """The name of their directory, in the run's directory and in each checkpoint."""

    @property
    def model(self) -> TransformerDecoder:
        """The model that has them."""

    def save(self, directory: Path) -> None:
        """Write them to a directory that does not exist yet."""

    def load(self, directory: Path) -> None:
        """Read into the model what :meth:`save` wrote.

        Raises:
            UserError: they are not whole, or do not fit the model.
        """


@dataclass(frozen=True)
class AdapterWeights:
    """The adapter of a model, in PEFT's format.

    Attributes:
        base_model: the base's name on the hub, or its directory.
        texts: files beside the weights, the prompt format for example: content by file name.
    """

    name: ClassVar[str] = "adapter"
    model: TransformerDecoder
    base_model: str
    texts: Mapping[str, str]

    def save(self, directory: Path) -> None:
        save_adapter(self.model, directory, self.base_model, self.texts)

    def load(self, directory: Path) -> None:
        load_adapter(self.model, open_adapter(directory))
