"""Answers that a model generates to the questions of a data set, compared with the answers in the set."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.modules import TransformerDecoder
from tqdm import tqdm

from custom_components.datasets.tokenized_rows import ChatDataset
from custom_components.generation.decoding import generate
from custom_components.generation.sampling import Sampling
from custom_components.runtime.errors import UserError
from custom_components.transforms.chat_transform import ChatTransform


@dataclass(frozen=True)
class Question:
    """A row's last question, with everything before it, and the answer in the row.

    Attributes:
        prompt: ids, up to where the answer begins.
        reference: the answer as text.
    """

    prompt: list[int]
    reference: str


class _Words:
    """rouge-score's tokenizer protocol: lower-case words of any script.

    For ASCII the words are those of its own tokenizer, which drops all other letters: an answer in Greek would have no
    words.
    """

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def held_out_questions(dataset: ChatDataset, tokenizer: ChatTransform, num_rows: int) -> list[Question]:
    """Collect the last question and answer of the first `num_rows` rows that have one.

    Rows of plain text have no question, and answers cut to `max_seq_len` are left out.

    Raises:
        UserError: no row has a question with a whole answer.
    """
    questions: list[Question] = []
    for index in range(len(dataset)):
        if len(questions) == num_rows:
            break
        row = dataset[index]
        is_answer = np.array(row["labels"]) != CROSS_ENTROPY_IGNORE_IDX
        end = int(np.flatnonzero(is_answer)[-1]) + 1
        start = end - int(np.argmin([*is_answer[end - 1 :: -1], False]))
        is_whole = row["tokens"][end - 1] in tokenizer.stop_tokens
        if is_whole and row["tokens"][:start] not in ([], [tokenizer.bos_id]):
            questions.append(Question(row["tokens"][:start], tokenizer.decode(row["tokens"][start:end]).strip()))
    if not questions:
        raise UserError("generate_answers: no row of the data set has a question with a whole answer; set it to 0")
    return questions


def generated_answers(
    model: TransformerDecoder,
    tokenizer: ChatTransform,
    questions: Sequence[Question],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Generate the model's greedy answers, stripped as the references are."""
    order = sorted(range(len(questions)), key=lambda index: -len(questions[index].prompt))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    answers = [""] * len(questions)
    for batch in tqdm(batches, "answering", unit="batch", leave=False, delay=2, disable=None):
        ids = generate(
            model,
            [questions[index].prompt for index in batch],
            max_new_tokens=max_new_tokens,
            stop_tokens=tokenizer.stop_tokens,
            sampling=Sampling(),
        )
        for index, answer_ids in zip(batch, ids, strict=True):
            answers[index] = tokenizer.decode(answer_ids).strip()
    return answers


def answer_measures(answers: Sequence[str], questions: Sequence[Question]) -> dict[str, float | int]:
    """Measure how close answers are to those of the rows."""
    references = [question.reference for question in questions]
    return {
        "questions": len(questions),
        "exact_match": exact_match(answers, references),
        "rouge_l": rouge_l(answers, references),
    }


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Compute the share of answers that equal the reference, character for character."""
    return sum(answer == reference for answer, reference in zip(answers, references, strict=True)) / len(references)


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
    """Compute the answers' mean F-measure of ROUGE-L, 0 to 1: Lin 2004, section 3, by Google's `rouge-score`."""
    scorer = rouge_scorer().RougeScorer(["rougeL"], tokenizer=_Words())
    f_measures = [
        scorer.score(reference, answer)["rougeL"].fmeasure
        for answer, reference in zip(answers, references, strict=True)
    ]
    return sum(f_measures) / len(f_measures)


def rouge_scorer() -> Any:
    """Import the module of the `rouge-score` package.

    Raises:
        UserError: it is not installed.
    """
    try:
        from rouge_score import rouge_scorer as module
    except ImportError:
        raise UserError("generate_answers: needs the package rouge-score; pip install -e '.[eval]'") from None
    return module
