"""Rows to train on: dialogs in a file, and rows of tokens."""

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch


def write_dialogs(path: Path, dialogs: Iterable[tuple[str, str]]) -> Path:
    """A JSONL file of questions and answers."""
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in dialogs]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


def write_pairs(path: Path, num_pairs: int) -> Path:
    """A JSONL file of questions with a better and a worse answer."""
    better, worse = random_dialogs(num_pairs), random_dialogs(num_pairs, seed=1)
    pairs = [
        {"prompt": question, "chosen": chosen, "rejected": f"no, {rejected}"}
        for (question, chosen), (_, rejected) in zip(better, worse, strict=True)
    ]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def random_dialogs(num_dialogs: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Questions and answers of one to eight words."""
    generator = random.Random(seed)
    words = ["red", "green", "blue", "up", "down", "left", "right"]
    for _ in range(num_dialogs):
        question, answer = (" ".join(generator.choices(words, k=generator.randint(1, 8))) for _ in range(2))
        yield question, answer


def random_rows(num_rows: int, seed: int = 0, vocab_size: int = 1024) -> list[dict[str, list[int]]]:
    """Rows of different lengths, the first part of each masked, one masked whole."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(num_rows):
        length = int(torch.randint(5, 30, (), generator=generator))
        tokens = torch.randint(3, vocab_size, (length,), generator=generator).tolist()
        num_masked = length if index == 2 else int(torch.randint(1, length - 2, (), generator=generator))
        rows.append({"tokens": tokens, "labels": [-100] * num_masked + tokens[num_masked:]})
    return rows
