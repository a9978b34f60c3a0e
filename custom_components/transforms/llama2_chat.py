"""Llama 2's tokenizer and chat format, exactly as Meta trained its chat models."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from custom_components.transforms.chat_transform import ChatTransform, TrainOn


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Llama2ChatTransform(ChatTransform):
    """A SentencePiece `tokenizer.model` and Llama 2's chat format, unless another is named.

    See :class:`ChatTransform` for the arguments.
    """

    def __init__(
        self,
        path: str | Path,
        max_seq_len: int | None = None,
        system_prompt: str | None = None,
        prompt_template: str | dict[str, str] = "llama2",
        train_on: TrainOn = "assistant",
        trainable_tokens: Sequence[str] | None = None,
        adapter_dir: Path | None = None,
    ) -> None:
        super().__init__(path, max_seq_len, system_prompt, prompt_template, train_on, trainable_tokens, adapter_dir)
