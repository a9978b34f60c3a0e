"""A SentencePiece model as a `tokenizer.json`: that of a Llama 2 or Mistral that comes without tokenizer.model.

Pieces begin with U+2581 where a word does, and characters that have no piece are split into bytes. The package
tokenizers gives the ids, so they are transformers' on the same file.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import tokenizers

from custom_components.runtime.errors import UserError
from custom_components.transforms.added_tokens import read_added_tokens
from custom_components.transforms.json_tokenizer import JsonTokenizer, ends_of_texts

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_PROBE = "a  b\n\n\tc's 12345 Où? 漢字 🙂 "


@dataclass(frozen=True)
class ByteFallbackTokenizer(JsonTokenizer):
    """Llama 2's kind of tokenizer, without its tokenizer.model.

    Attributes:
        unk_piece: the text of the token for unknown text.
        begins_word_after_control_tokens: the first word after a control token gets a space before it, as the first of
            a text does. Not in files that transformers wrote without `legacy: true`.
    """

    unk_piece: str | None = None
    begins_word_after_control_tokens: bool = True

    @staticmethod
    def read(path: Path, backend: tokenizers.Tokenizer, unk_piece: str | None) -> "ByteFallbackTokenizer":
        """Read what the files beside a `tokenizer.json` call its tokens.

        Args:
            backend: as read from it.
            unk_piece: the text of its token for unknown text.

        Raises:
            UserError: it changes texts or joins words into one piece, or has no token that ends texts.
        """
        added = read_added_tokens(path.parent, 0)
        bos, eos = ends_of_texts(path.parent, added, backend)

        def ids(text: str) -> list[int]:
            return backend.encode(text, add_special_tokens=False).ids

        begins_word = ids(f"{backend.id_to_token(eos)}a") == [eos, *ids("a")]
        # Control tokens that are typed in a text are only text.
        backend.encode_special_tokens = True
        _check_that_answers_can_be_split_off(path, backend)
        return ByteFallbackTokenizer(
            path,
            backend,
            added,
            bos,
            eos,
            unk_piece=unk_piece,
            begins_word_after_control_tokens=begins_word,
        )

    @property
    def named_pieces(self) -> dict[str, str]:
        unk = {} if self.unk_piece is None else {"unk_token": self.unk_piece}
        return super().named_pieces | unk

    @cached_property
    def _newline_ids(self) -> list[int]:
        return self.encode(["\n"])[0]

    @property
    def puts_space_before_texts(self) -> bool:
        """Whether the first word of a text gets a space before it."""
        return self.encode(["a"]) != self.encode_continued(["a"])

    def encode_continued(self, texts: Sequence[str]) -> list[list[int]]:
        # The newline keeps the space of the first word from a text that follows another.
        num_newline_ids = len(self._newline_ids)
        return [ids[num_newline_ids:] for ids in self.encode([f"\n{text}" for text in texts])]

    def decode(self, token_ids: Sequence[int], *, follows_text: bool = False) -> str:
        if not follows_text:
            return super().decode(token_ids)
        newline = super().decode(self._newline_ids)
        return super().decode([*self._newline_ids, *token_ids])[len(newline) :]

    def text_of_pieces(self, token_ids: Sequence[int]) -> str:
        parts: list[bytes] = []
        for token in map(int, token_ids):
            piece = self.piece(token) or f"<{token}>"
            byte = _BYTE.fullmatch(piece)
            parts.append(bytes.fromhex(byte[1]) if byte else piece.replace(_SPACE, " ").encode())
        return b"".join(parts).decode(errors="replace")


def _check_that_answers_can_be_split_off(path: Path, backend: tokenizers.Tokenizer) -> None:
    """Refuse a tokenizer in which a piece could span the seam between prompt and answer, as of a tokenizer.model."""
    pieces = backend.get_vocab(with_added_tokens=False)
    crossing = next((piece for piece in pieces if _SPACE in piece.lstrip(_SPACE) or "\n" in piece), None)

    def ids(text: str) -> list[int]:
        return backend.encode(text, add_special_tokens=False).ids

    if crossing is not None or ids("\nx")[: len(ids("\n"))] != ids("\n"):
        raise UserError(
            f"{path}: joins words into one piece ({crossing!r}) or drops newlines; Llama's tokenizers do not, and this "
            "one cannot be used for the chat format"
        )
    if backend.decode(ids(_PROBE)) != _PROBE:
        raise UserError(f"{path}: changes texts (spaces, for example), which Llama's tokenizers do not; not supported")
