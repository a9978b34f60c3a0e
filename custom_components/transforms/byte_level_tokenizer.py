"""A byte-level byte-pair encoding in a `tokenizer.json`: the tokenizer of Llama 3, SmolLM2 and others."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import ClassVar

import tokenizers

from custom_components.runtime.errors import UserError
from custom_components.transforms.added_tokens import read_added_tokens
from custom_components.transforms.json_tokenizer import JsonTokenizer, ends_of_texts

_NUM_CHARS_AT_BORDER = 64
_PROBE = " a  b\n\n\tc's 12345 Où? 漢字 🙂 "


@dataclass(frozen=True)
class ByteLevelTokenizer(JsonTokenizer):
    """GPT-2's kind of tokenizer: pieces are of bytes, so there is no unknown text and no dummy space."""

    has_pieces_of_several_words: ClassVar[bool] = True

    @staticmethod
    def read(path: Path, backend: tokenizers.Tokenizer) -> "ByteLevelTokenizer":
        """Read what the files beside a `tokenizer.json` call its tokens.

        Args:
            backend: as read from it.

        Raises:
            UserError: it changes texts, or has no token that ends texts.
        """
        # Control tokens that are typed in a text are only text.
        backend.encode_special_tokens = True
        # Prompt and answer are encoded apart: a space that is put before every text would be between them.
        if backend.decode(backend.encode(_PROBE, add_special_tokens=False).ids) != _PROBE:
            raise UserError(
                f"{path}: changes texts (spaces, for example), which Llama's tokenizers do not; not supported"
            )
        added = read_added_tokens(path.parent, 0)
        return ByteLevelTokenizer(path, backend, added, *ends_of_texts(path.parent, added, backend))

    def encode_continued(self, texts: Sequence[str]) -> list[list[int]]:
        return self.encode(texts)

    def spans(self, before: str, after: str) -> bool:
        # A token ends at the latest where a word does, so a few words on both sides decide.
        before, after = before[-_NUM_CHARS_AT_BORDER:], after[:_NUM_CHARS_AT_BORDER]
        offsets = self.backend.encode(before + after, add_special_tokens=False).offsets
        return any(start < len(before) < end for start, end in offsets)

    def text_of_pieces(self, token_ids: Sequence[int]) -> str:
        parts = []
        for is_known, run in groupby(map(int, token_ids), lambda token: self.piece(token) is not None):
            if is_known:
                parts.append(self.backend.decode([*run], skip_special_tokens=False))
            else:
                parts += [f"<{token}>" for token in run]
        return "".join(parts)
