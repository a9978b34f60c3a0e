"""From files to rows of tokens: what a config may name as `dataset`."""

from custom_components.datasets.chat import WeightedSource, chat_dataset

__all__ = [
    "WeightedSource",
    "chat_dataset",
]
