"""A checkpoint's tokenizer: its SentencePiece model and the tokens that its other files add."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import sentencepiece

from custom_components.runtime.errors import UserError
from custom_components.transforms.added_tokens import AddedTokens, read_added_tokens


@dataclass(frozen=True)
class Tokenizer:
    """Encodes text and decodes ids."""

    processor: sentencepiece.SentencePieceProcessor
    added_tokens: AddedTokens

    @staticmethod
    def read(path: str | Path) -> "Tokenizer":
        """Read a `tokenizer.model`, and what the files beside it add.

        Raises:
            UserError: there is no such file, it is not a SentencePiece model, or a file beside it is damaged.
        """
        if not Path(path).is_file():
            raise UserError(
                f"tokenizer.path: {str(path)!r} is not a file; it is the checkpoint's SentencePiece tokenizer.model"
            )
        try:
            processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except RuntimeError:
            raise UserError(f"tokenizer.path: {str(path)!r} is not a SentencePiece model; download it again") from None
        tokenizer = Tokenizer(processor, read_added_tokens(Path(path).parent, processor.vocab_size()))
        tokenizer._check_that_answers_can_be_split_off(path)
        return tokenizer

    @property
    def num_pieces(self) -> int:
        """Pieces of the SentencePiece model. Added tokens have ids from here on."""
        return self.processor.vocab_size()

    @property
    def digest(self) -> str:
        """A hash of the SentencePiece model."""
        return hashlib.sha256(self.processor.serialized_model_proto()).hexdigest()

    @cached_property
    def newline_ids(self) -> list[int]:
        return self.processor.encode("\n")

    def encode(self, texts: Sequence[str], marks: Sequence[str] = ()) -> list[list[int]]:
        """Encode texts, without BOS and EOS.

        Args:
            marks: added tokens to recognize; what is between two of them is encoded as a text of its own. Others, and
                control tokens, are only text.
        """
        if not marks:
            return self.processor.encode(list(texts))
        ids = self.added_tokens.ids
        # The longest first, as other tokenizers match them.
        pattern = re.compile(f"({'|'.join(map(re.escape, sorted(marks, key=len, reverse=True)))})")
        return [
            [
                token
                for part in pattern.split(text)
                if part
                for token in ([ids[part]] if part in marks else self.processor.encode(part))
            ]
            for text in texts
        ]

    def decode(self, token_ids: Sequence[int], *, follows_text: bool = False) -> str:
        """Decode ids to text, without control tokens and ids beyond the tokenizer, of a padded vocabulary.

        Args:
            follows_text: keep the space of the first word, which SentencePiece drops at the start of a text.
        """
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

    def ids_of_pieces(self, pieces: Sequence[str]) -> list[int]:
        """Look up control tokens and other pieces by name, such as `</s>`.

        Raises:
            UserError: the tokenizer has no such piece.
        """
        if unknown := [piece for piece in pieces if self.id_of(piece) is None]:
            raise UserError(
                f"stop_tokens: the tokenizer has no {unknown}; is this the tokenizer of the adapter's base?"
            )
        return [index for piece in pieces if (index := self.id_of(piece)) is not None]

    def id_of(self, piece: str) -> int | None:
        """Look up the id of a control token or another piece by its name; None: the tokenizer has none."""
        if piece in self.added_tokens.ids:
            return self.added_tokens.ids[piece]
        index = self.processor.piece_to_id(piece)
        return index if self.processor.id_to_piece(index) == piece else None

    def piece(self, token: int) -> str | None:
        """Look up the name of a token; None: the tokenizer has none of this id."""
        if 0 <= token < self.num_pieces:
            return self.processor.id_to_piece(token)
        return next((added.text for added in self.added_tokens.tokens if added.index == token), None)

    def is_control(self, token: int) -> bool:
        """Tell whether a token is one that text cannot spell, such as BOS and EOS, or one that the checkpoint adds."""
        is_piece = 0 <= token < self.num_pieces
        return not is_piece or self.processor.is_control(token) or self.processor.is_unknown(token)

    def text_of_pieces(self, token_ids: Sequence[int]) -> str:
        """Show ids as text: control tokens by name, spaces kept, broken characters replaced."""
        parts: list[bytes] = []
        for token in token_ids:
            if token < self.num_pieces and self.processor.is_byte(token):
                parts.append(bytes([int(self.processor.id_to_piece(token)[3:-1], 16)]))
            else:
                parts.append((self.piece(token) or f"<{token}>").replace("\u2581", " ").encode())
        return b"".join(parts).decode(errors="replace")

    def _check_that_answers_can_be_split_off(self, path: str | Path) -> None:
        """Refuse a tokenizer in which a piece could span the seam between prompt and answer.

        Meta encodes both in one call; separately they give the same ids only if no piece spans the seam. An answer
        begins with a space or after a newline, so the seam is safe if no piece has a space after another character or
        a newline, which is true of every Llama tokenizer (SentencePiece's split_by_whitespace).
        """
        pieces = (self.processor.id_to_piece(index) for index in range(self.num_pieces))
        crossing = next((piece for piece in pieces if "\u2581" in piece.lstrip("\u2581") or "\n" in piece), None)
        if crossing is not None or self.processor.encode("\nx")[: len(self.newline_ids)] != self.newline_ids:
            raise UserError(
                f"tokenizer.path: {str(path)!r} joins words into one piece ({crossing!r}) or drops newlines; "
                "Llama's tokenizers do not, and this one cannot be used for the chat format"
            )
