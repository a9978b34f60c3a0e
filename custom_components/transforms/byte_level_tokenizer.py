"""A byte-level byte-pair encoding in a `tokenizer.json`: the tokenizer of Llama 3, SmolLM2 and others."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import tokenizers

from custom_components.runtime.errors import UserError
from custom_components.runtime.json_files import read_json_object
from custom_components.transforms.added_tokens import AddedTokens, read_added_tokens, stated_ids
from custom_components.transforms.tokenizer import Tokenizer

_NUM_CHARS_AT_BORDER = 64
_PROBE = " a  b\n\n\tc's 12345 Où? 漢字 🙂 "


@dataclass(frozen=True)
class ByteLevelTokenizer(Tokenizer):
    """GPT-2's kind of tokenizer: pieces are of bytes, so there is no unknown text and no dummy space.

    Attributes:
        is_extended: `backend` has tokens that the file does not have.
    """

    path: Path
    backend: tokenizers.Tokenizer
    added_tokens: AddedTokens
    bos_token: int | None
    eos_token: int
    is_extended: bool = False
    has_pieces_of_several_words: ClassVar[bool] = True

    @staticmethod
    def read(path: Path) -> "ByteLevelTokenizer":
        """Read a `tokenizer.json`, and what the files beside it call its tokens.

        Raises:
            UserError: it is not a byte-level tokenizer, or has no token that ends texts.
        """
        content = read_json_object(path)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001 - the package raises nothing more special
            raise UserError(f"{path}: not a tokenizer.json ({error}); download it again") from None
        backend.no_truncation()
        backend.no_padding()
        # Control tokens that are typed in a text are only text.
        backend.encode_special_tokens = True
        _check_is_byte_level(path, content, backend)
        added = read_added_tokens(path.parent, 0)
        bos = _named_id(path.parent, added, backend, "bos_token")
        eos = _named_id(path.parent, added, backend, "eos_token")
        if eos is None:
            raise UserError(
                f"{path.parent}: no file says which token ends a text; add eos_token to tokenizer_config.json"
            )
        return ByteLevelTokenizer(path, backend, added, bos, eos)

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

    def encode_continued(self, texts: Sequence[str]) -> list[list[int]]:
        return self.encode(texts)

    def with_control_tokens(self, names: Sequence[str]) -> "ByteLevelTokenizer":
        others = {token.text for token in self.added_tokens.tokens if not token.is_special and token.text in names}
        if not others:
            return self
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = True
        backend.add_special_tokens([tokenizers.AddedToken(text, normalized=False, special=True) for text in others])
        tokens = tuple(
            replace(token, is_special=True) if token.text in others else token for token in self.added_tokens.tokens
        )
        return replace(self, backend=backend, added_tokens=replace(self.added_tokens, tokens=tokens))

    def spans(self, before: str, after: str) -> bool:
        # A token ends at the latest where a word does, so a few words on both sides decide.
        before, after = before[-_NUM_CHARS_AT_BORDER:], after[:_NUM_CHARS_AT_BORDER]
        offsets = self.backend.encode(before + after, add_special_tokens=False).offsets
        return any(start < len(before) < end for start, end in offsets)

    def decode(self, token_ids: Sequence[int], *, follows_text: bool = False) -> str:
        return self.backend.decode([int(token) for token in token_ids], skip_special_tokens=True)

    def id_of(self, piece: str) -> int | None:
        return self.backend.token_to_id(piece)

    def piece(self, token: int) -> str | None:
        return self.backend.id_to_token(token) if token >= 0 else None

    def is_control(self, token: int) -> bool:
        return token in self._special_ids or self.piece(token) is None

    def text_of_pieces(self, token_ids: Sequence[int]) -> str:
        parts = []
        for is_known, run in groupby(map(int, token_ids), lambda token: self.piece(token) is not None):
            if is_known:
                parts.append(self.backend.decode([*run], skip_special_tokens=False))
            else:
                parts += [f"<{token}>" for token in run]
        return "".join(parts)

    def with_added_tokens(self, added_tokens: AddedTokens) -> "ByteLevelTokenizer":
        return replace(self, added_tokens=added_tokens)

    def with_new_tokens(self, texts: Sequence[str]) -> "ByteLevelTokenizer":
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = True  # note: not part of what the package writes
        backend.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in texts])
        extended = super().with_new_tokens(texts)
        assert all(backend.token_to_id(text) == extended.added_tokens.ids[text] for text in texts), texts
        return replace(extended, backend=backend, is_extended=True)

    @property
    def file_text(self) -> str:
        """The content of a `tokenizer.json` with all its tokens."""
        return self.backend.to_str(pretty=True) if self.is_extended else self.path.read_bytes().decode()


def _check_is_byte_level(path: Path, content: Mapping[str, Any], backend: tokenizers.Tokenizer) -> None:
    model = content.get("model") or {}
    if model.get("type", "BPE") != "BPE" or "ByteLevel" not in json.dumps(content.get("pre_tokenizer")):
        raise UserError(
            f"{path}: is not a byte-level BPE tokenizer (its model is {model.get('type')!r}), and there is no "
            "SentencePiece tokenizer.model beside it; one of the two is needed"
        )
    # Prompt and answer are encoded apart: a space that is put before every text would be between them.
    if backend.decode(backend.encode(_PROBE, add_special_tokens=False).ids) != _PROBE:
        raise UserError(f"{path}: changes texts (spaces, for example), which Llama's tokenizers do not; not supported")


def _named_id(directory: Path, added: AddedTokens, backend: tokenizers.Tokenizer, name: str) -> int | None:
    """Find the token that a checkpoint calls so, in its tokenizer's files, else in those of the model."""
    if name in added.names:
        index = backend.token_to_id(added.names[name])
        if index is None:
            raise UserError(f"{directory}: {name} is {added.names[name]!r}, which tokenizer.json does not have")
        return index
    stated = [index for index in stated_ids(directory, f"{name}_id") if backend.id_to_token(index) is not None]
    return stated[0] if stated else None
