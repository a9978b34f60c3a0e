"""Finding and reading the tokenizer of a checkpoint."""

from pathlib import Path

from custom_components.runtime.errors import UserError
from custom_components.transforms.byte_level_tokenizer import ByteLevelTokenizer
from custom_components.transforms.sentencepiece_tokenizer import SentencePieceTokenizer
from custom_components.transforms.tokenizer import Tokenizer

# How Meta's tokenizer.model of Llama 3 begins: openai/tiktoken's format, a base64 text and its rank on each line.
_TIKTOKEN_START = b"IQ== 0\n"


def read_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer and what the files beside it add.

    Args:
        path: a checkpoint's directory, where tokenizer.model is taken, else tokenizer.json; or one of these files.

    Raises:
        UserError: there is no such file, or it is not a tokenizer of these kinds.
    """
    found = Path(path)
    if found.is_dir():
        files = [found / name for name in ("tokenizer.model", "tokenizer.json")]
        present = [file for file in files if file.is_file() and not _is_tiktoken(file)]
        if not present:
            raise UserError(
                f"tokenizer.path: {str(path)!r} has no SentencePiece tokenizer.model and no tokenizer.json"
                + ("; Meta's file of Llama 3 is of another kind: take tokenizer.json" if files[0].is_file() else "")
                + "; is the download whole?"
            )
        found = present[0]
    if not found.is_file():
        raise UserError(
            f"tokenizer.path: {str(path)!r} is not a file; it is the checkpoint's SentencePiece tokenizer.model, its "
            "tokenizer.json, or the checkpoint's directory"
        )
    if found.suffix == ".json":
        return ByteLevelTokenizer.read(found)
    if _is_tiktoken(found):
        raise UserError(f"tokenizer.path: {str(path)!r} is Llama 3's in Meta's format; name its tokenizer.json")
    return SentencePieceTokenizer.read(found)


def _is_tiktoken(file: Path) -> bool:
    with file.open("rb") as content:
        return content.read(len(_TIKTOKEN_START)) == _TIKTOKEN_START
