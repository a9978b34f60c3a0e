"""The columns of a row besides those of its format: refused, honoured as marks, or named as unused."""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from custom_components.transforms.training_marks import is_blank, is_empty, mark_keys, marked_as_trained

PAIR_RECIPE = "recipes/lora_dpo_single_device.py"
# Columns that belong to what the model would read or write, and cannot be trained here.
_REFUSED = {
    *("images", "image", "videos", "video", "audios", "audio", "tools", "tool_calls", "functions", "function_call"),
}
# The better and the worse of two answers, as published sets and OpenAI's format call them.
_ANSWER_PAIRS = [
    *[("chosen", "rejected"), ("chosen_response", "rejected_response"), ("response_chosen", "response_rejected")],
    *[("chosen_conversations", "rejected_conversations"), ("preferred_output", "non_preferred_output")],
    *[("response_j", "response_k"), ("accepted", "rejected"), ("preferred", "dispreferred"), ("better", "worse")],
]
_GOOD_OR_BAD = {"label", "kto_tag"}
_TRUTHS = {"true", "false", "0", "1"}
# A question and its answer, as sets that are not in one of our formats call them.
_PAIRS = [
    *[("question", "answer"), ("question", "response"), ("question", "output"), ("prompt", "response")],
    *[("prompt", "answer"), ("prompt", "output"), ("prompt", "chosen"), ("instruction", "response")],
    *[("instruction", "completion"), ("instruction", "answer"), ("instruction", "output"), ("input", "output")],
    *[("input", "response"), ("query", "response"), ("query", "answer"), ("user", "assistant"), ("source", "target")],
    *[("prompt", "completion"), ("input", "target"), ("q", "a"), ("human", "assistant"), ("problem", "solution")],
]
# Not a question, an answer or a text to train on by itself.
_METADATA = {
    "context",
    "passage",
    "id",
    "_id",
    "uuid",
    "title",
    "url",
    "source",
    "language",
    "category",
    "date",
    "timestamp",
}
_MESSAGES = ("conversation", "dialogue", "dialog", "chat", "turns", "history")


def pair_problem(columns: Collection[str]) -> str | None:
    """Say what columns of preferences are, if both the better and the worse answer are there."""
    if (pair := _answer_pair(columns)) is None:
        return None
    better, worse = pair
    return (
        f"{better!r} and {worse!r} are a pair of answers, which {PAIR_RECIPE} trains on; to "
        f"train on the better answer alone set 'dataset.column_map={{prompt: prompt, completion: {better}}}'"
    )


def judged_column(values: Mapping[str, Any]) -> str | None:
    """Find a column that judges a row's one answer as good or bad, as in KTO's sets."""
    return next((column for column in values if _judges(column, values[column])), None)


def suggested_pair_map(values: Mapping[str, Any]) -> str:
    """Give the override that names the columns of a row with two answers, as well as their names tell."""
    better, worse = _answer_pair(values) or ("...", "...")
    lower = {str(column).lower(): str(column) for column in values}
    question = next((lower[name] for name, _ in _PAIRS if name in lower), "...")
    columns = {"prompt": question, "chosen": better, "rejected": worse}
    return f"'dataset.column_map={{{', '.join(f'{ours}: {_yaml(name)}' for ours, name in columns.items())}}}'"


def check_columns(values: Mapping[str, Any], known: Collection[str], *, is_dialog: bool) -> tuple[bool, list[str]]:
    """Check a row's other columns.

    Args:
        known: the columns of the row's format.
        is_dialog: the row has questions and answers, so that a truth value beside them judges the answer.

    Returns:
        whether the row is to be trained on, and the columns that are not used.

    Raises:
        ValueError: a column that cannot be trained, or a mark of what is trained that cannot be honoured.
    """
    others = [column for column in values if column not in known and not is_blank(values[column])]
    if not others:
        return True, []
    if problem := pair_problem(others):
        raise ValueError(problem)
    for column in others:
        name = str(column).lower()
        if name in _REFUSED and not is_empty(values[column]):
            raise ValueError(f"has {column!r}, which cannot be trained; delete the column, or leave such rows out")
        if is_dialog and _judges(column, values[column]):
            raise ValueError(
                f"{column!r} holds {str(values[column])!r}, which judges the answer, as in KTO's sets; "
                f"{PAIR_RECIPE} takes pairs of answers; to train on the good answers, keep their rows and delete the "
                "column"
            )
    marks = mark_keys(others)
    is_trained = marked_as_trained(values, marks, "the row") is not False
    return is_trained, [str(column) for column in others if column not in marks]


def _judges(column: object, value: object) -> bool:
    return str(column).lower() in _GOOD_OR_BAD and str(value).lower() in _TRUTHS


def _answer_pair(columns: Collection[str]) -> tuple[str, str] | None:
    names = {column.lower(): column for column in columns if isinstance(column, str)}
    pairs = [(names[better], names[worse]) for better, worse in _ANSWER_PAIRS if {better, worse} <= names.keys()]
    return next(iter(pairs), None)


def neglected_pair(values: Mapping[str, Any]) -> str | None:
    """Name the question and answer beside a `text` that would be trained in their place, if there are any."""
    for question, answer in _PAIRS:
        if not is_blank(values.get(question)) and not is_blank(values.get(answer)):
            return (
                f"has 'text' beside {question!r} and {answer!r}; say what is trained: "
                f"'dataset.column_map={_column_map(question, answer)}', or dataset.format=text"
            )
    return None


def suggested_column_map(values: Mapping[str, Any]) -> str:
    """Give the override that names a row's columns, as well as their names and values tell."""
    lower = {str(column).lower(): str(column) for column in values}
    for name in _MESSAGES:
        value = values.get(lower.get(name, ""))
        if isinstance(value, list) or (isinstance(value, str) and value.startswith("[")):
            return f"'dataset.column_map={{messages: {_yaml(lower[name])}}}'"
    for question, answer in _PAIRS:
        if question in lower and answer in lower:
            further = next((lower[name] for name in ("context", "passage") if name in lower), None)
            return f"'dataset.column_map={_column_map(lower[question], lower[answer], further)}'"
    texts = [column for column, value in values.items() if isinstance(value, str) and column.lower() not in _METADATA]
    if len(texts) == 1 and texts[0].lower() not in {question for question, _ in _PAIRS}:
        return f"'dataset.column_map={{text: {_yaml(texts[0])}}}'"
    questions = [column for column in texts if column.lower() in {question for question, _ in _PAIRS}]
    question, answer, *_ = [*dict.fromkeys([*questions[:1], *texts]), "...", "..."]
    return f"'dataset.column_map={_column_map(question, answer)}'"


def _column_map(question: str, answer: str, further: str | None = None) -> str:
    if further is not None:
        return f"{{instruction: {_yaml(question)}, input: {_yaml(further)}, output: {_yaml(answer)}}}"
    return f"{{prompt: {_yaml(question)}, completion: {_yaml(answer)}}}"


def _yaml(name: str) -> str:
    is_plain = (
        name == "..."
        or re.fullmatch(r"[^\W\d][\w ./-]*", name)
        and name.lower()
        not in (
            "yes",
            "no",
            "on",
            "off",
            "y",
            "n",
            "null",
        )
    )
    return name if is_plain else json.dumps(name, ensure_ascii=False)
