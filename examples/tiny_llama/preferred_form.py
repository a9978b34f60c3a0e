"""Measure how often an adapter answers in the form that the pairs of make_pairs.py prefer, and how often rightly.

python -m examples.tiny_llama.preferred_form outputs/tiny_qlora/adapter outputs/tiny_dpo/adapter

Choose settings by the questions of data/val.jsonl (--questions), and measure on the others, which are the default.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from custom_components.datasets.sources import read_rows
from custom_components.generation.decoding import Sampling, answer_messages
from custom_components.runtime.errors import run_recipe
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.weights.adapted_model import load_model_for_inference
from custom_components.weights.adapter_files import open_adapter
from custom_components.weights.checkpoint_files import open_checkpoint
from examples.tiny_llama.make_pairs import DATA, wanted_form

CHECKPOINT = Path(__file__).parent / "checkpoint"


class Shares(NamedTuple):
    """Shares of all answers: those in the wanted form, those with the right word, and those that are both exactly."""

    wanted_form: float
    right_word: float
    both: float


def shares(answers: Sequence[str], right_answers: Sequence[str]) -> Shares:
    """Compare answers with the right ones, which are not in the wanted form."""
    full_stop = wanted_form("")
    pairs = list(zip(answers, right_answers, strict=True))
    counts = (
        sum(answer.endswith(full_stop) for answer in answers),
        sum(answer.removesuffix(full_stop) == right for answer, right in pairs),
        sum(answer == wanted_form(right) for answer, right in pairs),
    )
    return Shares(*(count / len(pairs) for count in counts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", type=Path, nargs="+", help="the adapter/ of runs on the embedded model")
    parser.add_argument("--questions", type=Path, default=DATA / "held_out.jsonl", help="default: held_out.jsonl")
    arguments = parser.parse_args()
    dialogs = [row.values["messages"] for row in read_rows(str(arguments.questions))]
    questions, right_answers = [dialog[:-1] for dialog in dialogs], [dialog[-1]["content"] for dialog in dialogs]
    base = open_checkpoint(CHECKPOINT)
    tokenizer = Llama2ChatTransform(base.tokenizer_model)
    print(f"{len(questions)} questions of {arguments.questions.name}; wanted form, right word, both:")
    for path in arguments.adapters:
        # The base in 4 bits, as the configs of both runs have it.
        model = load_model_for_inference(base, open_adapter(path), True, torch.float32, torch.device("cpu"))
        answers = answer_messages(model, tokenizer, questions, max_new_tokens=16, sampling=Sampling())
        print(f"{path}: {' '.join(f'{share:.1%}' for share in shares(answers, right_answers))}", flush=True)


if __name__ == "__main__":
    run_recipe(main)
