"""Files to rows of tokens: the components that a config can name as `dataset`."""

from custom_components.datasets.chat import chat_dataset
from custom_components.datasets.preference import preference_dataset
from custom_components.datasets.source_list import WeightedSource

__all__ = [
    "WeightedSource",
    "chat_dataset",
    "preference_dataset",
]
