"""Files to rows of tokens: the components that a config can name as `dataset`."""

from custom_components.datasets.chat import WeightedSource, chat_dataset

__all__ = [
    "WeightedSource",
    "chat_dataset",
]
