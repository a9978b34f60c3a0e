"""What every tokenizer of a checkpoint can do, whatever its file."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Self

from custom_components.runtime.errors import UserError
from custom_components.transforms.added_tokens import AddedToken, AddedTokens


class Tokenizer(ABC):
    """Encodes text and decodes ids.

    Attributes:
        path: its file.
        added_tokens: those in addition to the file's own vocabulary, and the checkpoint's names for tokens.
        has_pieces_of_several_words: of two newlines, for example: a token may span the border of two texts.
    """

    path: Path
    added_tokens: AddedTokens
    has_pieces_of_several_words: ClassVar[bool] = False

    @property
    def begins_word_after_control_tokens(self) -> bool:
        """Whether a text after a control token is encoded as the start of a text is."""
        return True

    @property
    @abstractmethod
    def bos_id(self) -> int | None:
        """The token that begins texts; None: there is none."""

    @property
    @abstractmethod
    def eos_id(self) -> int:
        """The token that ends texts."""

    @property
    @abstractmethod
    def num_pieces(self) -> int:
        """Pieces of the vocabulary, without those that are added to it."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """A hash of all that determines the ids of a text."""

    @property
    @abstractmethod
    def control_ids(self) -> Mapping[str, int]:
        """The ids of the tokens that a template may name."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts, without BOS and EOS. Names of control tokens are only text."""

    @abstractmethod
    def encode_continued(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts that follow another text directly, where a tokenizer puts no space before the first word."""

    @abstractmethod
    def decode(self, token_ids: Sequence[int], *, follows_text: bool = False) -> str:
        """Decode ids to text, without control tokens and ids beyond the tokenizer, of a padded vocabulary.

        Args:
            follows_text: keep the space of the first word, which SentencePiece drops at the start of a text.
        """

    @abstractmethod
    def piece(self, token: int) -> str | None:
        """Look up the name of a token; None: the tokenizer has none of this id."""

    @abstractmethod
    def id_of(self, piece: str) -> int | None:
        """Look up the id of a control token or another piece by its name; None: the tokenizer has none."""

    @abstractmethod
    def is_control(self, token: int) -> bool:
        """Tell whether a token is one that text cannot spell, such as BOS and EOS, or one that the checkpoint adds."""

    @abstractmethod
    def text_of_pieces(self, token_ids: Sequence[int]) -> str:
        """Show ids as text: control tokens by name, spaces kept, broken characters replaced."""

    @abstractmethod
    def with_added_tokens(self, added_tokens: AddedTokens) -> Self:
        """Make a tokenizer that has these tokens in addition to its own vocabulary."""

    def with_control_tokens(self, names: Sequence[str]) -> Self:
        """Make a tokenizer to which these added tokens are control tokens: their names in a text are only text."""
        return self

    def spans(self, before: str, after: str) -> bool:
        """Tell whether a token would span the border of two texts, were they encoded as one."""
        assert not self.has_pieces_of_several_words
        return False

    def with_new_tokens(self, texts: Sequence[str]) -> Self:
        """Make a tokenizer that has these control tokens too, with the next ids; it has none of them yet."""
        new = tuple(AddedToken(self.num_ids + number, text, is_special=True) for number, text in enumerate(texts))
        return self.with_added_tokens(replace(self.added_tokens, tokens=(*self.added_tokens.tokens, *new)))

    @property
    def num_ids(self) -> int:
        """One more than the highest id."""
        return max([self.num_pieces, *(1 + token.index for token in self.added_tokens.tokens)])

    @property
    def bos_piece(self) -> str | None:
        return None if self.bos_id is None else self.piece(self.bos_id)

    @property
    def eos_piece(self) -> str:
        piece = self.piece(self.eos_id)
        assert piece is not None, self.eos_id
        return piece

    @property
    def named_pieces(self) -> dict[str, str]:
        """The texts of the tokens that the file itself has for BOS, EOS and unknown text, by transformers' names."""
        bos = {} if self.bos_piece is None else {"bos_token": self.bos_piece}
        return {**bos, "eos_token": self.eos_piece}

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
