"""A byte-pair encoding that the package tokenizers computes: what those of every kind of `tokenizer.json` share."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers

from custom_components.runtime.errors import UserError
from custom_components.runtime.text_files import MOST_BYTES, check_is_file
from custom_components.runtime.validation import shown
from custom_components.transforms.added_tokens import AddedTokens, stated_ids
from custom_components.transforms.tokenizer import Tokenizer


@dataclass(frozen=True)
class JsonTokenizer(Tokenizer):
    """The tokenizer of a `tokenizer.json`, or of a file that can be written as one.

    Attributes:
        is_as_in_file: `path` is a tokenizer.json with all tokens of `backend`.
    """

    path: Path
    backend: tokenizers.Tokenizer
    added_tokens: AddedTokens
    bos_token: int | None
    eos_token: int
    is_as_in_file: bool = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.backend.encode_special_tokens = True  # note: not part of what the package pickles

    @property
    def bos_id(self) -> int | None:
        return self.bos_token

    @property
    def eos_id(self) -> int:
        return self.eos_token

    @property
    def num_pieces(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=False)

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(token.index for token in self.added_tokens.tokens if token.is_special)

    @cached_property
    def control_ids(self) -> Mapping[str, int]:
        return {text: index for text, index in self.added_tokens.ids.items() if text.strip()}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def with_control_tokens(self, names: Sequence[str]) -> Self:
        others = {token.text for token in self.added_tokens.tokens if not token.is_special and token.text in names}
        if not others:
            return self
        tokens = tuple(
            replace(token, is_special=True) if token.text in others else token for token in self.added_tokens.tokens
        )
        return replace(
            self,
            backend=_with_control_tokens(self.backend, others),
            added_tokens=replace(self.added_tokens, tokens=tokens),
        )

    def decode(self, token_ids: Sequence[int], *, follows_text: bool = False) -> str:
        return self.backend.decode([int(token) for token in token_ids], skip_special_tokens=True)

    def id_of(self, piece: str) -> int | None:
        return self.backend.token_to_id(piece)

    def piece(self, token: int) -> str | None:
        return self.backend.id_to_token(token) if token >= 0 else None

    def is_control(self, token: int) -> bool:
        return token in self._special_ids or self.piece(token) is None

    def with_added_tokens(self, added_tokens: AddedTokens) -> Self:
        return replace(self, added_tokens=added_tokens)

    def with_new_tokens(self, texts: Sequence[str]) -> Self:
        backend = _with_control_tokens(self.backend, texts)
        extended = super().with_new_tokens(texts)
        assert all(backend.token_to_id(text) == extended.added_tokens.ids[text] for text in texts), texts
        return replace(extended, backend=backend, is_as_in_file=False)

    @property
    def file_text(self) -> str:
        """The content of a `tokenizer.json` with all its tokens."""
        return self.path.read_bytes().decode() if self.is_as_in_file else self.backend.to_str(pretty=True)


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json.

    Raises:
        UserError: it is damaged.
    """
    try:
        check_is_file(path, MOST_BYTES)
        backend = tokenizers.Tokenizer.from_file(str(path))
        backend.encode("a 1\n\u6f22")
    except BaseException as error:  # the package raises nothing more special, and what Rust panics with is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(f"{path}: not a tokenizer.json ({shown(str(error))}); download it again") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def ends_of_texts(directory: Path, added_tokens: AddedTokens, backend: tokenizers.Tokenizer) -> tuple[int | None, int]:
    """Look up BOS, which there may be none of, and EOS by what a checkpoint's files call so.

    Raises:
        UserError: no file says which token is EOS, or the tokenizer does not have the one that is named.
    """
    bos, eos = (_named_id(directory, added_tokens, backend, name) for name in ("bos_token", "eos_token"))
    if eos is None:
        raise UserError(f"{directory}: no file says which token ends a text; add eos_token to tokenizer_config.json")
    return bos, eos


def _named_id(directory: Path, added: AddedTokens, backend: tokenizers.Tokenizer, name: str) -> int | None:
    """Find the token that a checkpoint calls so, in its tokenizer's files, else in those of the model."""
    if name in added.names:
        index = backend.token_to_id(added.names[name])
        if index is None:
            raise UserError(f"{directory}: {name} is {added.names[name]!r}, which tokenizer.json does not have")
        return index
    stated = [index for index in stated_ids(directory, f"{name}_id") if backend.id_to_token(index) is not None]
    return stated[0] if stated else None


def _with_control_tokens(backend: tokenizers.Tokenizer, texts: Sequence[str] | set[str]) -> tokenizers.Tokenizer:
    extended = tokenizers.Tokenizer.from_str(backend.to_str())
    extended.encode_special_tokens = True  # note: not part of what the package writes
    extended.add_special_tokens([tokenizers.AddedToken(text, normalized=False, special=True) for text in texts])
    return extended
