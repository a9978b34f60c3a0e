"""Tokens that a checkpoint has in addition to its SentencePiece model, such as `<pad>` or `<|im_start|>`.

They are listed in files that transformers writes: `added_tokens` of tokenizer.json, `added_tokens_decoder` of
tokenizer_config.json, added_tokens.json. What they are for is in tokenizer_config.json and special_tokens_map.json.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from custom_components.runtime.errors import UserError
from custom_components.runtime.json_files import read_json_object
from custom_components.runtime.validation import shown

# What transformers has names for (PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES).
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_NUM_SHOWN = 6
# Room for each id up to the largest is made in a tokenizer and in the model.
_LARGEST_ID = 2**24
# How the text around a token is treated: fields of AddedToken in the package tokenizers.
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


@dataclass(frozen=True)
class AddedToken:
    """A token in addition to the SentencePiece model.

    Attributes:
        is_special: left out when ids are decoded to text.
        flags: of `tokenizers.AddedToken`, as far as the checkpoint states them.
    """

    index: int
    text: str
    is_special: bool
    flags: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class AddedTokens:
    """The added tokens of a checkpoint, and its names for tokens.

    Attributes:
        tokens: those that the SentencePiece model does not have, in the order of their ids.
        names: the texts of tokens by what transformers calls them, such as `pad_token`.
        other_special: texts that transformers is told are special, without a name.
    """

    tokens: tuple[AddedToken, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    other_special: tuple[str, ...] = ()

    @property
    def ids(self) -> dict[str, int]:
        return {token.text: token.index for token in self.tokens}

    def split_at(self, num_ids: int) -> tuple["AddedTokens", "AddedTokens"]:
        """Split into the tokens with smaller ids, which keep the names, and the others."""
        below = tuple(token for token in self.tokens if token.index < num_ids)
        others = self.tokens[len(below) :]
        gone = {token.text for token in others}
        names = {name: text for name, text in self.names.items() if text not in gone}
        other_special = tuple(text for text in self.other_special if text not in gone)
        return AddedTokens(below, names, other_special), AddedTokens(others)

    def __str__(self) -> str:
        shown = [token.text for token in self.tokens[:_NUM_SHOWN]]
        texts = ", ".join(shown) + (", ..." if len(self.tokens) > _NUM_SHOWN else "")
        return f"{len(self.tokens)} added {'token' if len(self.tokens) == 1 else 'tokens'} ({texts})"


def read_added_tokens(directory: Path, num_pieces: int) -> AddedTokens:
    """Read a directory's tokens in addition to its tokenizer.model.

    Args:
        num_pieces: of the SentencePiece model. Tokens with smaller ids are its own.

    Raises:
        UserError: a file that is not of transformers' format, or two that disagree.
    """
    config = read_json(directory / "tokenizer_config.json")
    names_file = read_json(directory / "special_tokens_map.json")
    names: dict[str, str] = {}
    other_special: list[str] = []
    for values, file in ((names_file, "special_tokens_map.json"), (config, "tokenizer_config.json")):
        names |= {name: _text(values[name], directory / file, name) for name in NAMES if values.get(name) is not None}
        for key in ("additional_special_tokens", "extra_special_tokens"):
            listed = values.get(key)
            if isinstance(listed, list):
                other_special += [_text(entry, directory / file, key) for entry in listed]
    tokens: dict[int, AddedToken] = {}
    is_named = {*names.values(), *other_special}
    for token, path in _stated_tokens(directory, config, lambda text: text in is_named):
        if token.index < num_pieces:
            continue
        known = tokens.setdefault(token.index, token)
        if known.text != token.text:
            raise UserError(
                f"{path}: token {token.index} is {token.text!r}, where another of the tokenizer's files has "
                f"{known.text!r}; keep the file that is right"
            )
    added = [token for _, token in sorted(tokens.items())]
    return AddedTokens(tuple(added), names, tuple(dict.fromkeys(other_special)))


def _stated_tokens(
    directory: Path, config: dict[str, Any], is_special: Callable[[str], bool]
) -> Iterator[tuple[AddedToken, Path]]:
    """Every token of the three files, those first that say most of them."""
    path = directory / "tokenizer.json"
    for entry in _entries(read_json(path).get("added_tokens", []), list, path, "added_tokens"):
        yield _token(entry, entry.get("id") if isinstance(entry, dict) else None, path, "added_tokens"), path
    path = directory / "tokenizer_config.json"
    key = "added_tokens_decoder"
    for index, entry in _entries(config.get(key, {}), dict, path, key):
        yield _token(entry, int(index) if index.isdecimal() and len(index) < 10 else None, path, key), path
    path = directory / "added_tokens.json"
    for text, index in read_json(path).items():
        yield _token({"content": text, "special": is_special(text)}, index, path, text), path


def _entries(value: Any, kind: type, path: Path, key: str) -> Any:
    if not isinstance(value, kind):
        raise UserError(f"{path}: {key} is not a {kind.__name__} of tokens; download the file again")
    return value.items() if isinstance(value, dict) else value


def _token(entry: Any, index: Any, path: Path, key: str) -> AddedToken:
    is_whole = isinstance(entry, dict) and isinstance(entry.get("content"), str) and entry["content"]
    if not is_whole or type(index) is not int or not 0 <= index <= _LARGEST_ID:
        raise UserError(f"{path}: {key} has {shown(entry)}, which is not a token with its id; download it again")
    flags = {name: entry[name] for name in _FLAGS if isinstance(entry.get(name), bool)}
    return AddedToken(index, entry["content"], bool(entry.get("special", False)), flags)


def _text(value: Any, path: Path, key: str) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise UserError(f"{path}: {key} is {shown(value)}, not the text of a token; download the file again")
    return text


def stated_ids(directory: Path, key: str) -> list[int]:
    """Read the ids that a checkpoint's generation_config.json, else its config.json, has under a key as `eos_token_id`.

    Raises:
        UserError: what is there is not ids.
    """
    for path in (directory / "generation_config.json", directory / "config.json"):
        value = read_json(path).get(key)
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(index) is int and index <= _LARGEST_ID for index in ids):
                raise UserError(f"{path}: {key} is {shown(value)}, not the id of a token, nor a list of ids")
            return [index for index in ids if index >= 0]  # -1 is none
    return []


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file's values; none if there is no such file.

    Raises:
        UserError: it is not a JSON object.
    """
    return read_json_object(path) if path.exists() else {}
