"""Where the project's own files are."""

from pathlib import Path

PROJECT = Path(__file__).parents[2]
TINY_LLAMA = PROJECT / "examples/tiny_llama"
TINY_TOKENIZER = TINY_LLAMA / "checkpoint/tokenizer.model"


def snapshot(folder: Path) -> dict[Path, bytes | str]:
    """Every file's bytes, every link's target, and the directories, by path."""
    return {
        path: str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else "directory"
        for path in folder.rglob("*")
    }
