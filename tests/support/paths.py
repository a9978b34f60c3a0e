"""Where the project's own files are."""

from pathlib import Path

PROJECT = Path(__file__).parents[2]
TINY_LLAMA = PROJECT / "examples/tiny_llama"
TINY_TOKENIZER = TINY_LLAMA / "checkpoint/tokenizer.model"
