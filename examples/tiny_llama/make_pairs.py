"""Make pairs of answers: each question's right answer in the form that is wanted, and in the form that is not.

python -m examples.tiny_llama.make_pairs
"""

import json
from pathlib import Path

from custom_components.datasets.sources import read_rows

DATA = Path(__file__).parent / "data"
NUM_TRAINING_PAIRS = 400


def wanted_form(answer: str) -> str:
    """Write an answer as it is to be: with a full stop."""
    return f"{answer}."


def write_pairs(source: Path, target: Path, num_pairs: int | None = None) -> None:
    """Write a pair for each of the first questions of a set: the answer in the wanted form, and as it is."""
    dialogs = [row.values["messages"] for row in read_rows(str(source))][:num_pairs]
    pairs = [
        {"prompt": question["content"], "chosen": wanted_form(answer["content"]), "rejected": answer["content"]}
        for question, answer in dialogs
    ]
    target.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


def main() -> None:
    write_pairs(DATA / "train.jsonl", DATA / "pairs_train.jsonl", NUM_TRAINING_PAIRS)
    write_pairs(DATA / "val.jsonl", DATA / "pairs_val.jsonl")


if __name__ == "__main__":
    main()
