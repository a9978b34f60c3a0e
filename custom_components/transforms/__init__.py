"""From dialogs to token ids and back: what a config may name as `tokenizer`."""

from custom_components.transforms.llama2_chat import Llama2ChatTransform

__all__ = [
    "Llama2ChatTransform",
]
