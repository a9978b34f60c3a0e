"""Llama 3's tokenizer.model, as Meta publishes it: a base64 text and its rank on each line, the format of tiktoken.

How ranks become merges, and the names of the control tokens, which are in no file: openai/tiktoken, src/lib.rs,
`byte_pair_merge` (of all neighbours, those that join to the text of the lowest rank are joined first); tokenizer.json
of meta-llama/Meta-Llama-3-8B and of Llama-3.1-8B, whose ids are those of meta-llama/llama-models @364ed4e,
models/llama3/api/tokenizer.py.
"""

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors

from custom_components.runtime.errors import UserError
from custom_components.transforms.added_tokens import AddedToken, AddedTokens
from custom_components.transforms.byte_level_tokenizer import ByteLevelTokenizer

# The text "!" is the first of Llama 3's, of rank 0.
_START = b"IQ== 0\n"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_BOS, _EOS, _PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"
_NUM_CONTROL_TOKENS = 256
# By their place after the ranks; those between are reserved and have a number in their name.
_LLAMA3_NAMES = {0: _BOS, 1: _EOS, 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "<|eot_id|>"}
_LLAMA3_1_NAMES = {**_LLAMA3_NAMES, 4: _PAD, 8: "<|eom_id|>", 10: "<|python_tag|>"}


def is_tiktoken(file: Path) -> bool:
    """Tell whether a tokenizer.model is Llama 3's of Meta, not SentencePiece's."""
    with file.open("rb") as content:
        return content.read(len(_START)) == _START


def read_tiktoken(path: Path) -> ByteLevelTokenizer:
    """Read Meta's tokenizer.model of Llama 3; params.json beside it tells whether it is of 3.1 or later.

    Raises:
        UserError: a damaged file.
    """
    ranks = _read_ranks(path)
    letters = _byte_letters()
    vocabulary = {_spelled(text, letters): rank for text, rank in ranks.items()}
    merges = [(_spelled(left, letters), _spelled(right, letters)) for left, right in _merges(ranks)]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    control = _control_tokens(len(ranks), _LLAMA3_1_NAMES if _is_of_3_1(path.parent) else _LLAMA3_NAMES)
    backend.add_special_tokens([tokenizers.AddedToken(token.text, normalized=False) for token in control])
    bos, eos = control[0].index, control[1].index
    backend.post_processor = processors.TemplateProcessing(single=[_BOS, "$A"], special_tokens=[(_BOS, bos)])
    # Control tokens that are typed in a text are only text.
    backend.encode_special_tokens = True
    names = {"bos_token": _BOS, "eos_token": _EOS}
    return ByteLevelTokenizer(path, backend, AddedTokens(control, names), bos, eos, is_as_in_file=False)


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines()):
        try:
            text, rank = line.split()
            ranks[base64.b64decode(text, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(
                f"{path}:{number + 1}: {line[:60]!r} is not a text and its rank; download it again"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise UserError(f"{path}: has not every rank once, or not every byte; download it again")
    return ranks


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """List the pairs that join to a text, those of the lowest rank first."""
    for text in sorted(ranks, key=ranks.__getitem__):
        for end in range(1, len(text)):
            if text[:end] in ranks and text[end:] in ranks:
                yield text[:end], text[end:]


def _byte_letters() -> list[str]:
    """List the letter that stands for each byte in a byte-level tokenizer.json: openai/gpt-2 @9b63575, encoder.py.

    Bytes that are printable in Latin-1 stand for themselves, and the others for the letters from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _spelled(text: bytes, letters: list[str]) -> str:
    return "".join(letters[byte] for byte in text)


def _control_tokens(first_id: int, names: Mapping[int, str]) -> tuple[AddedToken, ...]:
    reserved = (f"<|reserved_special_token_{number}|>" for number in range(_NUM_CONTROL_TOKENS))
    texts = [names.get(place) or next(reserved) for place in range(_NUM_CONTROL_TOKENS)]
    return tuple(AddedToken(first_id + place, text, is_special=True) for place, text in enumerate(texts))


def _is_of_3_1(directory: Path) -> bool:
    try:
        return bool(json.loads((directory / "params.json").read_text(encoding="utf-8")).get("use_scaled_rope"))
    except (OSError, ValueError, AttributeError):
        return False
