"""Rows with a dialog in their columns to messages: one converter for each format; see :mod:`row_formats`."""

from collections.abc import Callable
from typing import Any

from custom_components.datasets.row_messages import (
    RowMessage,
    RowNotes,
    answer_text,
    listed,
    row_messages,
    shown,
)

RowConverter = Callable[[dict[str, Any], RowNotes], list[RowMessage]]


def messages_row(values: dict[str, Any], notes: RowNotes) -> list[RowMessage]:
    """Convert `{"messages": [...]}`, see :func:`row_messages`.

    Raises:
        ValueError: it is not a list of messages.
    """
    return row_messages(column(values, "messages"), "messages", notes)


def sharegpt_row(values: dict[str, Any], notes: RowNotes) -> list[RowMessage]:
    """Convert `{"conversations": [...]}`, see :func:`row_messages`.

    Raises:
        ValueError: it is not a list of messages.
    """
    return row_messages(column(values, "conversations"), "conversations", notes)


def alpaca_row(values: dict[str, Any], notes: RowNotes, answer: str = "output") -> list[RowMessage]:
    """Convert `{"instruction", "input", "output"}`, with an optional `history`, a list of earlier [question, answer].

    tatsu-lab/stanford_alpaca, README.md; `history`: hiyouga/LLaMA-Factory, data/README.md.

    Args:
        answer: the column of the answer.

    Raises:
        ValueError: a column is not text, or `history` is not a list of pairs.
    """
    instruction, further = text_of(values, "instruction"), optional_text(values, "input")
    messages = []
    history = values.get("history") or []
    if not isinstance(history, list):
        raise ValueError(f"'history' holds {shown(history)} where a list of [question, answer] is due")
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError(f"'history' holds {shown(pair)} where [question, answer] is due")
        messages += [RowMessage("user", pair[0], "'history'"), RowMessage("assistant", pair[1], "'history'")]
    parts = (instruction, further) if instruction.strip() and further.strip() else None
    messages.append(RowMessage("user", joined(instruction, further), "'instruction'", None, parts))
    messages.append(RowMessage("assistant", answer_of(values, answer, notes), repr(answer)))
    return messages


def prompt_completion_row(values: dict[str, Any], notes: RowNotes, answer: str = "completion") -> list[RowMessage]:
    """Convert `{"prompt", "completion"}`, each text or a list of messages, as TRL's conversational sets have them.

    A completion that begins with the prompt, such as the `chosen` of a preference set, is the whole dialog.

    Args:
        answer: the column of the answer.

    Raises:
        ValueError: one of them is not text and not a list of messages.
    """
    prompt = column(values, "prompt")
    if isinstance(prompt, list):
        messages = row_messages(prompt, "prompt", notes)
    else:
        messages = [RowMessage("user", text_of(values, "prompt"), "'prompt'")]
    return answered(messages, values, answer, notes)


def answered(messages: list[RowMessage], values: dict[str, Any], answer: str, notes: RowNotes) -> list[RowMessage]:
    """Add a column's answer to the messages before it: text, a list of messages, or a list that repeats those.

    Raises:
        ValueError: the column is not text and not a list of messages.
    """
    if not isinstance(column(values, answer), list):
        return [*messages, RowMessage("assistant", answer_of(values, answer, notes), repr(answer))]
    added = row_messages(values[answer], answer, notes)
    num_before = added[0].role == "system" and messages[0].role != "system" if added and messages else 0
    repeated = added[num_before : num_before + len(messages)]
    if [message[:2] for message in repeated] == [message[:2] for message in messages]:
        return added
    return [*messages, *added]


def text_of(values: dict[str, Any], name: str) -> str:
    """Give the text of a column.

    Raises:
        ValueError: there is no such column, or it holds something else.
    """
    return _checked_text(column(values, name), name)


def answer_of(values: dict[str, Any], name: str, notes: RowNotes) -> str:
    """Give the text of a column that is an answer; see :func:`answer_text`.

    Raises:
        ValueError: there is no such column, or it holds something else.
    """
    return _checked_text(answer_text(column(values, name), notes), name)


def optional_text(values: dict[str, Any], name: str) -> str:
    return "" if values.get(name) is None else text_of(values, name)


def column(values: dict[str, Any], name: str) -> Any:
    if name not in values:
        raise ValueError(f"there is no column {name!r}, but {listed(values)}")
    return values[name]


def joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part.strip())


def _checked_text(text: Any, name: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{name!r} holds {shown(text)} where text is due")
    return text
