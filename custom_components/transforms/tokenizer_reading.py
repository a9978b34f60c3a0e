"""Finding and reading the tokenizer of a checkpoint."""

import json
from pathlib import Path

from custom_components.runtime.errors import UserError
from custom_components.transforms.byte_fallback_tokenizer import ByteFallbackTokenizer
from custom_components.transforms.byte_level_tokenizer import ByteLevelTokenizer
from custom_components.transforms.json_tokenizer import read_backend
from custom_components.transforms.sentencepiece_tokenizer import SentencePieceTokenizer
from custom_components.transforms.tiktoken_file import is_tiktoken, read_tiktoken
from custom_components.transforms.tokenizer import Tokenizer


def read_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer and what the files beside it add.

    Args:
        path: a checkpoint's directory, where SentencePiece's tokenizer.model is taken, else tokenizer.json, else Meta's
            tokenizer.model of Llama 3; or one of these files.

    Raises:
        UserError: there is no such file, or it is not a tokenizer of these kinds.
    """
    found = Path(path)
    if found.is_dir():
        files = [found / name for name in ("tokenizer.model", "tokenizer.json")]
        present = sorted((file for file in files if file.is_file()), key=_is_metas)
        if not present:
            raise UserError(
                f"tokenizer.path: {str(path)!r} has no SentencePiece tokenizer.model and no tokenizer.json; is the "
                "download whole?"
            )
        found = present[0]
    if not found.is_file():
        raise UserError(
            f"tokenizer.path: {str(path)!r} is not a file; it is the checkpoint's SentencePiece tokenizer.model, its "
            "tokenizer.json, or the checkpoint's directory"
        )
    if found.suffix == ".json":
        return _read_json(found)
    return read_tiktoken(found) if is_tiktoken(found) else SentencePieceTokenizer.read(found)


def _is_metas(file: Path) -> bool:
    return file.suffix == ".model" and is_tiktoken(file)


def _read_json(path: Path) -> Tokenizer:
    backend = read_backend(path)
    content = json.loads(backend.to_str())
    model = content["model"]
    kind = model["type"]
    if kind == "BPE" and model["byte_fallback"]:
        return ByteFallbackTokenizer.read(path, backend, model["unk_token"])
    if kind == "BPE" and "ByteLevel" in json.dumps(content["pre_tokenizer"]):
        return ByteLevelTokenizer.read(path, backend)
    what = "byte-pair encoding that is neither of bytes nor falls back to them" if kind == "BPE" else f"{kind} model"
    raise UserError(
        f"{path}: is a {what}, and there is no SentencePiece tokenizer.model beside it; one of the two, or a byte-pair "
        "encoding of bytes, is needed"
    )
