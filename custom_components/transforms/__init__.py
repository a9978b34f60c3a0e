"""Dialogs to token ids and back: the components that a config can name as `tokenizer`."""

from custom_components.transforms.chat_transform import ChatTransform
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.transforms.llama2_tokenizer import llama2_tokenizer

__all__ = [
    "ChatTransform",
    "Llama2ChatTransform",
    "llama2_tokenizer",
]
