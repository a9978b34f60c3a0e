"""A SentencePiece model, `tokenizer.model`, and the tokens that a checkpoint's other files add to it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import sentencepiece

from custom_components.runtime.errors import UserError
from custom_components.runtime.text_files import MOST_BYTES, check_is_file
from custom_components.transforms.added_tokens import AddedTokens, read_added_tokens
from custom_components.transforms.tokenizer import Tokenizer


@dataclass(frozen=True)
class SentencePieceTokenizer(Tokenizer):
    """Llama 2's kind of tokenizer."""

    path: Path
    processor: sentencepiece.SentencePieceProcessor
    added_tokens: AddedTokens

    @staticmethod
    def read(path: Path) -> "SentencePieceTokenizer":
        """Read a `tokenizer.model`, and what the files beside it add.

        Raises:
            UserError: it is not a SentencePiece model, or a file beside it is damaged.
        """
        try:
            check_is_file(path, MOST_BYTES)
            processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
            _check_pieces(processor)
        except (OSError, RuntimeError, ValueError, LookupError) as error:
            reason = f" ({error})" if type(error) is ValueError else ""
            raise UserError(
                f"tokenizer.path: {str(path)!r} is not a SentencePiece model{reason}; download it again"
            ) from None
        tokenizer = SentencePieceTokenizer(path, processor, read_added_tokens(path.parent, processor.vocab_size()))
        tokenizer._check_that_answers_can_be_split_off()
        return tokenizer

    @property
    def bos_id(self) -> int | None:
        index = self.processor.bos_id()
        return index if index >= 0 else None

    @property
    def eos_id(self) -> int:
        return self.processor.eos_id()

    @property
    def num_pieces(self) -> int:
        return self.processor.vocab_size()

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.processor.serialized_model_proto()).hexdigest()

    @cached_property
    def control_ids(self) -> Mapping[str, int]:
        of_model = {
            self.processor.id_to_piece(index): index
            for index in range(self.num_pieces)
            if self.processor.is_control(index)
        }
        return of_model | self.added_tokens.ids

    @property
    def named_pieces(self) -> dict[str, str]:
        return super().named_pieces | {"unk_token": self.processor.id_to_piece(self.processor.unk_id())}

    @cached_property
    def newline_ids(self) -> list[int]:
        return self.processor.encode("\n")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.processor.encode(list(texts))

    def encode_continued(self, texts: Sequence[str]) -> list[list[int]]:
        # The newline keeps SentencePiece from putting its dummy space before a text that follows another.
        num_newline_ids = len(self.newline_ids)
        return [ids[num_newline_ids:] for ids in self.processor.encode([f"\n{text}" for text in texts])]

    def decode(self, token_ids: Sequence[int], *, follows_text: bool = False) -> str:
        shown = {token.index: token.text for token in self.added_tokens.tokens if not token.is_special}
        text = ""
        run: list[int] = []
        for token in map(int, token_ids):
            if token < self.num_pieces:
                run.append(token)
            elif token in shown:
                text += self._decode_run(run, follows_text) + shown[token]
                run, follows_text = [], True
        return text + self._decode_run(run, follows_text)

    def _decode_run(self, run: list[int], follows_text: bool) -> str:
        return self.processor.decode([*self.newline_ids, *run])[1:] if follows_text else self.processor.decode(run)

    def id_of(self, piece: str) -> int | None:
        if piece in self.added_tokens.ids:
            return self.added_tokens.ids[piece]
        index = self.processor.piece_to_id(piece)
        return index if self.processor.id_to_piece(index) == piece else None

    def piece(self, token: int) -> str | None:
        if 0 <= token < self.num_pieces:
            return self.processor.id_to_piece(token)
        return next((added.text for added in self.added_tokens.tokens if added.index == token), None)

    def is_control(self, token: int) -> bool:
        is_piece = 0 <= token < self.num_pieces
        return not is_piece or self.processor.is_control(token) or self.processor.is_unknown(token)

    def text_of_pieces(self, token_ids: Sequence[int]) -> str:
        parts: list[bytes] = []
        for token in token_ids:
            if token < self.num_pieces and self.processor.is_byte(token):
                parts.append(bytes([int(self.processor.id_to_piece(token)[3:-1], 16)]))
            else:
                parts.append((self.piece(token) or f"<{token}>").replace("\u2581", " ").encode())
        return b"".join(parts).decode(errors="replace")

    def with_added_tokens(self, added_tokens: AddedTokens) -> "SentencePieceTokenizer":
        return replace(self, added_tokens=added_tokens)

    def _check_that_answers_can_be_split_off(self) -> None:
        """Refuse a tokenizer in which a piece could span the seam between prompt and answer.

        Meta encodes both in one call; separately they give the same ids only if no piece spans the seam. An answer
        begins with a space or after a newline, so the seam is safe if no piece has a space after another character or
        a newline, which is true of every Llama tokenizer (SentencePiece's split_by_whitespace).
        """
        pieces = (self.processor.id_to_piece(index) for index in range(self.num_pieces))
        crossing = next((piece for piece in pieces if "\u2581" in piece.lstrip("\u2581") or "\n" in piece), None)
        if crossing is not None or self.processor.encode("\nx")[: len(self.newline_ids)] != self.newline_ids:
            raise UserError(
                f"tokenizer.path: {str(self.path)!r} joins words into one piece ({crossing!r}) or drops newlines; "
                "Llama's tokenizers do not, and this one cannot be used for the chat format"
            )


def _check_pieces(processor: sentencepiece.SentencePieceProcessor) -> None:
    """Look at all pieces of a model that SentencePiece has loaded: it takes damaged ones.

    Raises:
        ValueError: there is no token for unknown text or for the end of a text.
        RuntimeError, LookupError, UnicodeDecodeError: a piece is damaged.
    """
    num_pieces = processor.vocab_size()
    for name, index in {"unknown text": processor.unk_id(), "the end of a text": processor.eos_id()}.items():
        if not 0 <= index < num_pieces:
            raise ValueError(f"it has no token for {name}")
    for index in range(num_pieces):
        processor.id_to_piece(index)
    processor.decode(processor.encode("a 1\n\u6f22"))
