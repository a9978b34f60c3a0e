"""Dialogs to token ids and back: the components that a config can name as `tokenizer`."""

from custom_components.transforms.llama2_chat import Llama2ChatTransform

__all__ = [
    "Llama2ChatTransform",
]
