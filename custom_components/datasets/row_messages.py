"""The messages of a row as its file spells them, before they are checked as a dialog."""

import ast
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from custom_components.transforms.training_marks import is_blank, is_empty, mark_keys, marked_as_trained, names_of


class RowMessage(NamedTuple):
    """One message.

    Attributes:
        place: where it is in the row, such as `message 2` or `'output'`.
        is_supervised: what its marks say; None: nothing.
        instruction_and_input: the two parts that `content` joins, for templates that write them apart.
        mark: the keys of its marks, for errors.
    """

    role: str
    content: str
    place: str
    is_supervised: bool | None = None
    instruction_and_input: tuple[str, str] | None = None
    mark: str = ""


@dataclass
class RowNotes:
    """What was left out of a row or read in its own way, to be said in the account.

    Attributes:
        counted: things that happened, one entry each time, with `{s}` where their plural has an s.
        unused_columns, unused_keys: columns of the row, and keys of its messages, that have no part in training.
        foreign_marks: dialog marks in a text that is trained as prose.
    """

    counted: list[str] = field(default_factory=list)
    unused_columns: list[str] = field(default_factory=list)
    unused_keys: list[str] = field(default_factory=list)
    foreign_marks: list[str] = field(default_factory=list)


# OpenAI's roles; ShareGPT's (lm-sys/FastChat @0f49fe78, fastchat/data/split_long_conversation.py); Gemma's `model`;
# OpenAssistant's `prompter`.
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
}
# Parts of a message that would change what the model reads or writes.
_CONTENT_KEYS = {
    *("tool_calls", "tool_call_id", "tools", "functions", "function_call", "refusal", "audio", "images", "image"),
    *("videos", "video", "audios", "files", "thinking", "reasoning", "reasoning_content", "thinking_blocks"),
}
_TOOL_ROLES = {"tool", "function", "function_call", "tool_call", "observation", "ipython", "tool_response"}
_TEXT_PARTS = ("text", "input_text", "output_text")


def row_messages(value: Any, column: str, notes: RowNotes) -> list[RowMessage]:
    """Read a list of messages, each `{"role", "content"}` as OpenAI has it or `{"from", "value"}` as ShareGPT does.

    openai/openai-cookbook @b774cbf1, examples/Chat_finetuning_data_prep.ipynb. The list may be text that spells it, as
    JSON or, from pandas, in Python's notation.

    Raises:
        ValueError: it is not such a list, an unknown role, a content that is not text, or a key that changes what is
            read or trained and is not known.
    """
    entries = _parsed(value, column) if isinstance(value, str) else value
    if not isinstance(entries, list):
        raise ValueError(f"{column!r} holds {shown(entries)} where a list is due")
    where = "" if column in ("messages", "conversations") else f" of {column!r}"
    return [_row_message(entry, f"message {number}{where}", notes) for number, entry in enumerate(entries, 1)]


def answer_text(value: Any, notes: RowNotes) -> Any:
    """Give an answer that is a number or a truth value, such as a classifier's label, as its text in JSON.

    An answer that is null is empty.
    """
    if value is None:
        return ""
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        notes.counted.append("answer{s} given as a number or as true or false, trained as text")
        return json.dumps(value)
    return value


def listed(names: Collection[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names, key=str)) or "none"


def shown(value: Any) -> str:
    """Shorten a value to 60 characters, for an error message."""
    return repr(value[:60] if isinstance(value, str) else value)[:62]


def _parsed(text: str, column: str) -> Any:
    if text.lstrip().startswith("["):
        for parse in (json.loads, ast.literal_eval):
            try:
                return parse(text.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    return text


def _row_message(entry: Any, place: str, notes: RowNotes) -> RowMessage:
    if not isinstance(entry, dict):
        raise ValueError(f"{place} is {shown(entry)} where an object with role and content is due")
    pairs, marks = _known_keys(tuple(entry))
    if not pairs:
        raise ValueError(f"{place} has the keys {listed(entry)}, it needs 'role' and 'content', or 'from' and 'value'")
    role_key, content_key = next((pair for pair in pairs if entry[pair[0]] is not None), pairs[0])
    for key in entry.keys() - {role_key, content_key, *marks}:
        if not is_blank(entry[key]):
            is_content = key in _CONTENT_KEYS and not is_empty(entry[key])
            if is_content or key in ("content", "value", "role", "from"):
                raise ValueError(f"{place} has {key!r}, which cannot be trained; only role, content and weight can")
            notes.unused_keys.append(str(key))
    role = entry[role_key]
    meaning = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if meaning is None:
        if str(role).strip().lower() in _TOOL_ROLES:
            raise ValueError(f"{place} is of role {shown(role)}; calls of tools and their results cannot be trained")
        raise ValueError(f"{place} is of role {shown(role)}, not one of {', '.join(_ROLES)}")
    is_supervised = marked_as_trained(entry, marks, place) if marks else None
    content = entry[content_key]
    if isinstance(content, list):
        content = _joined_parts(content, place, notes)
    elif meaning == "assistant":
        content = answer_text(content, notes)
    elif content is None and meaning == "system":
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"{place} holds {shown(content)} where text is due")
    return RowMessage(meaning, content, place, is_supervised, mark=names_of(marks))


@lru_cache(maxsize=1024)
def _known_keys(keys: tuple[Any, ...]) -> tuple[list[tuple[str, str]], list[Any]]:
    """Find the pairs of a message's keys that may be its role and its content, and those that say what is trained."""
    pairs = [("role", "content"), ("from", "value"), ("role", "value"), ("from", "content")]
    return [pair for pair in pairs if set(pair) <= set(keys)], mark_keys(keys)


def _joined_parts(parts: list[Any], place: str, notes: RowNotes) -> str:
    """Join the text of a content that is a list of parts, as OpenAI's and LLaMA-Factory's rows may have it."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise ValueError(f"{place} has the part {shown(part)} where text is due")
        kind = part.get("type", "text")
        if kind not in _TEXT_PARTS:
            raise ValueError(f"{place} has a part of type {shown(kind)}, which cannot be trained; only text can")
        text = part["text"] if part.get("text") is not None else part.get("value")
        if not isinstance(text, str):
            raise ValueError(f"{place} has the part {shown(part)} without a text")
        for key, value in part.items():
            if key not in ("type", "text", "value") and not is_blank(value):
                if mark_keys([key]):
                    raise ValueError(f"{place} has a part with {key!r}; a message is trained whole: mark the message")
                notes.unused_keys.append(str(key))
        texts.append(text)
    return "".join(texts)
