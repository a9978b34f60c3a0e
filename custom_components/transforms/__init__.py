"""Dialogs to token ids and back: the components that a config can name as `tokenizer`."""

from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.transforms.llama2_tokenizer import llama2_tokenizer

__all__ = [
    "Llama2ChatTransform",
    "llama2_tokenizer",
]
