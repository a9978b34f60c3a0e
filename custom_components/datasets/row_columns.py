"""The columns of a row besides those of its format: refused, honoured as marks, or named as unused."""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from custom_components.transforms.training_marks import is_blank, mark_keys, marked_as_trained

# Columns that belong to what the model would read or write, and cannot be trained here.
_REFUSED = {
    *("images", "image", "videos", "video", "audios", "audio", "tools", "tool_calls", "functions", "function_call"),
}
_CHOSEN = {"chosen", "chosen_response", "response_chosen"}
_REJECTED = {"rejected", "rejected_response", "response_rejected"}
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
    names = {column.lower(): column for column in columns if isinstance(column, str)}
    chosen, rejected = _CHOSEN & names.keys(), _REJECTED & names.keys()
    if not (chosen and rejected):
        return None
    better, worse = names[min(chosen)], names[min(rejected)]
    return (
        f"{better!r} and {worse!r} are a pair of preferences, which a preference recipe takes "
        "(recipes/lora_dpo_single_device.py, to come); to "
        f"train on the better answer alone set 'dataset.column_map={{prompt: prompt, completion: {better}}}'"
    )


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
        if name in _REFUSED:
            raise ValueError(f"has {column!r}, which cannot be trained; delete the column, or leave such rows out")
        if is_dialog and name in _GOOD_OR_BAD and str(values[column]).lower() in _TRUTHS:
            raise ValueError(
                f"{column!r} holds {str(values[column])!r}, which judges the answer, as in KTO's sets; a preference "
                "recipe (recipes/lora_dpo_single_device.py, to come) takes pairs; to train on the good answers, keep "
                "their rows and delete the column"
            )
    marks = mark_keys(others)
    is_trained = marked_as_trained(values, marks, "the row") is not False
    return is_trained, [str(column) for column in others if column not in marks]


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
