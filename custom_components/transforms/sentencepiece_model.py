"""The parts of a SentencePiece model file that its processor does not show.

Format: google/sentencepiece, src/sentencepiece_model.proto, in protobuf's wire format (protobuf.dev, "Encoding"). Read
here because the module that sentencepiece generates for it needs one of the newest releases of protobuf.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from custom_components.runtime.errors import UserError

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5  # wire types
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType


class PieceType(IntEnum):
    """ModelProto.SentencePiece.Type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass
class Piece:
    text: str = ""
    score: float = 0.0
    type: PieceType = PieceType.NORMAL


@dataclass
class SentencePieceModel:
    """A model's pieces in the order of their ids, and how it normalizes text before splitting it.

    Attributes:
        is_byte_pair: byte-pair encoding, not one of SentencePiece's other algorithms.
        replaces_characters: text goes through a table of replacements, such as NFKC's.
        adds_leading_space: a space is put before every text.
        removes_repeated_spaces: leading, trailing and repeated spaces are dropped.
    """

    pieces: list[Piece] = field(default_factory=list)
    is_byte_pair: bool = False
    replaces_characters: bool = False
    adds_leading_space: bool = True
    removes_repeated_spaces: bool = True


def read_sentencepiece_model(path: Path) -> SentencePieceModel:
    """Read a `tokenizer.model` that SentencePiece itself can load.

    Raises:
        UserError: it is damaged.
    """
    try:
        return _model(path)
    except (OSError, ValueError, LookupError, TypeError, struct.error, AttributeError) as error:
        raise UserError(f"{path}: is a damaged SentencePiece model ({error}); download it again") from None


def _model(path: Path) -> SentencePieceModel:
    model = SentencePieceModel()
    for number, value in _fields(path.read_bytes()):
        if number == 1:
            model.pieces.append(_piece(value))
        elif number == 2:  # trainer_spec
            model.is_byte_pair = dict(_fields(value)).get(3, _UNIGRAM) == _BPE
        elif number == 3:
            normalizer_spec = dict(_fields(value))
            model.replaces_characters = bool(normalizer_spec.get(2))
            model.adds_leading_space = bool(normalizer_spec.get(3, True))
            model.removes_repeated_spaces = bool(normalizer_spec.get(4, True))
    return model


def _piece(message: bytes) -> Piece:
    piece = Piece()
    for number, value in _fields(message):
        if number == 1:
            piece.text = value.decode("utf-8")
        elif number == 2:
            (piece.score,) = struct.unpack("<f", value)
        elif number == 3:
            piece.type = PieceType(value)
    return piece


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Read the fields of a protobuf message in order: number and value, an int for varints, else bytes."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == _VARINT:
            yield number, varint()
        else:
            num_bytes = varint() if wire_type == _LENGTH_DELIMITED else {_FIXED32: 4, _FIXED64: 8}[wire_type]
            yield number, message[position : position + num_bytes]
            position += num_bytes
