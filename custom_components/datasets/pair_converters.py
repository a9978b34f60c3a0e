"""Rows with a pair of answers to messages: each gives the dialog with the answer of one column; see `pair_formats`."""

import re
from collections.abc import Mapping
from typing import Any

from custom_components.datasets.row_converters import alpaca_row, answered, column, prompt_completion_row
from custom_components.datasets.row_messages import RowMessage, RowNotes, row_messages, shown
from custom_components.datasets.text_rows import llama2_text_row, marked_text_row, text_format
from custom_components.transforms.training_marks import is_blank

# Anthropic/hh-rlhf, README.md: each text is "\n\nHuman: ...\n\nAssistant: ...", the questions in both the same.
_HUMAN_OR_ASSISTANT = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def prompt_pair(values: dict[str, Any], notes: RowNotes, answer: str) -> list[RowMessage]:
    """Convert `{"prompt", "chosen", "rejected"}`, each text or messages; an answer may repeat the prompt.

    huggingface/trl, docs/source/dataset_formats.md, "Preference".

    Raises:
        ValueError: a column is not text and not messages.
    """
    return prompt_completion_row(_with_list(values, answer), notes, answer)


def messages_pair(values: dict[str, Any], notes: RowNotes, answer: str) -> list[RowMessage]:
    """Convert `{"messages": [..., question], "chosen": message, "rejected": message}`.

    Axolotl, docs/rlhf.qmd, "chat_template.default".

    Raises:
        ValueError: a column is not messages.
    """
    return _after_messages("messages", values, notes, answer)


def sharegpt_pair(values: dict[str, Any], notes: RowNotes, answer: str) -> list[RowMessage]:
    """Convert `{"conversations": [..., question], "chosen": message, "rejected": message}`.

    hiyouga/LLaMA-Factory, data/README.md, "Sharegpt Format", "Preference Dataset".

    Raises:
        ValueError: a column is not messages.
    """
    return _after_messages("conversations", values, notes, answer)


def alpaca_pair(values: dict[str, Any], notes: RowNotes, answer: str) -> list[RowMessage]:
    """Convert `{"instruction", "input", "chosen", "rejected"}`, with an optional `history`; see :func:`alpaca_row`.

    hiyouga/LLaMA-Factory, data/README.md, "Alpaca Format", "Preference Dataset".

    Raises:
        ValueError: a column is not text, or `history` is not a list of pairs.
    """
    return alpaca_row(values, notes, answer)


def implicit_pair(values: dict[str, Any], notes: RowNotes, answer: str) -> list[RowMessage]:
    """Convert `{"chosen", "rejected"}`, two whole dialogs: messages, or texts with the marks of a dialog.

    huggingface/trl, docs/source/dataset_formats.md, "Preference", implicit prompt; Anthropic/hh-rlhf.

    Raises:
        ValueError: a column is neither.
    """
    value = column(values, answer)
    if isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("[{")):
        return row_messages(value, answer, notes)
    if not isinstance(value, str):
        raise ValueError(f"{answer!r} holds {shown(value)} where a dialog is due")
    if not value.strip():
        raise ValueError(f"{answer!r} is empty")
    if _HUMAN_OR_ASSISTANT.match(value):
        return _human_and_assistant(value, answer)
    readers = {"llama2_text": llama2_text_row, "marked_text": marked_text_row}
    if (reader := readers.get(text_format(value))) is None:
        raise ValueError(
            f"{answer!r} is text without a question: {shown(value)}; give the question as 'prompt', or name its column "
            "with dataset.column_map"
        )
    return reader({"text": value}, notes)


def openai_pair(values: dict[str, Any], notes: RowNotes, answer: str) -> list[RowMessage]:
    """Convert `{"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}`.

    OpenAI, "Direct preference optimization" of the fine-tuning guide.

    Raises:
        ValueError: a column is not such an object, or the input has tools.
    """
    given = column(values, "input")
    if not isinstance(given, Mapping) or "messages" not in given:
        raise ValueError(f"'input' holds {shown(given)} where an object with 'messages' is due")
    others = {key: value for key, value in given.items() if key != "messages" and not is_blank(value)}
    if "tools" in others:
        raise ValueError("'input' has 'tools', which cannot be trained; leave such rows out")
    notes.unused_keys += map(str, others)
    return answered(row_messages(given["messages"], "input", notes), values, answer, notes)


def _after_messages(name: str, values: dict[str, Any], notes: RowNotes, answer: str) -> list[RowMessage]:
    messages = row_messages(column(values, name), name, notes)
    return answered(messages, _with_list(values, answer), answer, notes)


def _with_list(values: dict[str, Any], answer: str) -> dict[str, Any]:
    """Wrap an answer that is a single message in a list."""
    return {**values, answer: [values[answer]]} if isinstance(values.get(answer), Mapping) else values


def _human_and_assistant(text: str, name: str) -> list[RowMessage]:
    _, *parts = _HUMAN_OR_ASSISTANT.split(text)
    return [
        RowMessage("user" if mark == "Human" else "assistant", content.strip(), f"message {number} of {name!r}")
        for number, (mark, content) in enumerate(zip(parts[::2], parts[1::2], strict=True), 1)
    ]
