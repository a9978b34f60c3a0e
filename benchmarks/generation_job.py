"""What generate.py hands to each tool, and what it gets back.

Imports nothing but the standard library, so that it also runs where this package is not installed.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class GenerationJob:
    """Prompts, as token ids, each to be answered alone and greedily with `max_new_tokens` tokens, whatever they are."""

    checkpoint_dir: str
    adapter_dir: str
    prompts: list[list[int]]
    max_new_tokens: int

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "GenerationJob":
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Answer:
    """The new tokens, and the clock when the prompt went in and when each of them came out, in seconds."""

    tokens: list[int]
    moments: list[float]

    @property
    def prefill_seconds(self) -> float:
        return self.moments[1] - self.moments[0]

    @property
    def token_seconds(self) -> list[float]:
        """Of every token but the first, which waits for the prompt to be read."""
        return [after - before for before, after in zip(self.moments[1:], self.moments[2:], strict=False)]


def print_answers(answers: Sequence[Answer]) -> None:
    """On standard output, as its last line."""
    print(json.dumps([asdict(answer) for answer in answers]), flush=True)


def parsed_answers(output: str) -> list[Answer]:
    return [Answer(**values) for values in json.loads(output.splitlines()[-1])]
