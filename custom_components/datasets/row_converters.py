"""Rows to messages: one converter for each format of :mod:`row_formats`."""

import re
from collections.abc import Callable, Collection
from typing import Any

from custom_components.transforms.dialogs import PLAIN_TEXT_ROLE, ChatMessage, chat_messages, with_system_message

RowConverter = Callable[[dict[str, Any]], list[ChatMessage]]


def messages_row(values: dict[str, Any]) -> list[ChatMessage]:
    """Convert `{"messages": [{"role", "content"}, ...]}`, OpenAI's form.

    openai/openai-cookbook @b774cbf1, examples/Chat_finetuning_data_prep.ipynb.

    Raises:
        ValueError: it is not a dialog, has an empty question or answer, or does not end with an answer.
    """
    return _dialog(_dicts(values, "messages"))


# lm-sys/FastChat @0f49fe78, fastchat/data/split_long_conversation.py; user and assistant as later sets spell them.
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
}


def sharegpt_row(values: dict[str, Any]) -> list[ChatMessage]:
    """Convert `{"conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}]}`, also with role and content.

    Raises:
        ValueError: it is not a dialog, has an unknown speaker or an empty question or answer, begins with an answer, or
            does not end with one.
    """
    messages = []
    for number, entry in enumerate(_dicts(values, "conversations"), 1):
        role_key, content_key = ("from", "value") if "from" in entry else ("role", "content")
        if role_key not in entry or content_key not in entry:
            raise ValueError(f"message {number} has the keys {listed(entry)}, it needs 'from' and 'value'")
        role = entry[role_key]
        if role != "system" and (not isinstance(role, str) or role not in _SHAREGPT_ROLES):
            raise ValueError(f"message {number} is from {shown(role)}, not one of system, {', '.join(_SHAREGPT_ROLES)}")
        role = _SHAREGPT_ROLES.get(role, role)
        messages.append({"role": role, "content": entry[content_key], "weight": entry.get("weight")})
    return _dialog(messages)


def alpaca_row(values: dict[str, Any]) -> list[ChatMessage]:
    """Convert `{"instruction", "input", "output"}`, with an optional `history`, a list of earlier [question, answer].

    tatsu-lab/stanford_alpaca, README.md; `history`: hiyouga/LLaMA-Factory, data/README.md.

    Raises:
        ValueError: a column is not text, a question or answer is empty, or `history` is not a list of pairs.
    """
    question = _joined(_text(values, "instruction"), _optional_text(values, "input"))
    messages = []
    history = values.get("history") or []
    if not isinstance(history, list):
        raise ValueError(f"'history' holds {shown(history)} where a list of [question, answer] is due")
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"'history' holds {shown(pair)} where [question, answer] is due")
        messages += _exchange(*pair)
    messages += _exchange(question, _text(values, "output"))
    return _dialog(messages)


def prompt_completion_row(values: dict[str, Any]) -> list[ChatMessage]:
    """Convert `{"prompt", "completion"}`.

    Raises:
        ValueError: one of them is empty or not text.
    """
    return _dialog(_exchange(_text(values, "prompt"), _text(values, "completion")))


# The </s> after an answer may be missing. Each \s* is followed by a non-space, so that no match is tried twice.
_LLAMA2_TURN = re.compile(r"\s*(?:<s>\s*)?\[INST\](.*?)\[/INST\](.*?)(?:</s>|(?=(?:<s>\s*)?\[INST\])|\Z)", re.DOTALL)
_LLAMA2_SYSTEM = re.compile(r"<<SYS>>\n?(.*?)\n?<</SYS>>\s*(.*)", re.DOTALL)
_LLAMA2_START = re.compile(r"\s*(?:<s>\s*)?\[INST\]")


def is_llama2_text(text: str) -> bool:
    return _LLAMA2_START.match(text) is not None


def llama2_text_row(values: dict[str, Any]) -> list[ChatMessage]:
    """Parse `{"text": "<s>[INST] question [/INST] answer </s><s>[INST] ..."}`, text in Llama 2's own format.

    Empty questions and answers are kept: published sets have them.

    Raises:
        ValueError: the text does not follow the format to its end.
    """
    text = _text(values, "text").rstrip()
    messages: list[ChatMessage] = []
    position = 0
    while position < len(text):
        match = _LLAMA2_TURN.match(text, position)
        if match is None:
            raise ValueError(f"'text' leaves the form <s>[INST] ... [/INST] ... </s> at {shown(text[position:])}")
        user, answer = match[1].strip(), match[2].strip()
        if not messages and (system := _LLAMA2_SYSTEM.fullmatch(user)):
            messages.append(ChatMessage("system", system[1]))
            user = system[2]
        messages += [ChatMessage("user", user), ChatMessage("assistant", answer)]
        position = match.end()
    if not messages:
        raise ValueError("'text' is empty")
    return messages


# The marks of a question and of its answer. timdettmers/openassistant-guanaco has Human and Assistant also within a
# line, `... question### Assistant: answer### Human: ...`, so only the other marks have to begin one.
_MARKS = [("Human", "Assistant"), ("HUMAN", "RESPONSE"), ("Instruction", "Response"), ("User", "Assistant")]
_MARK_PATTERNS = [
    re.compile(
        rf"{'' if question == 'Human' else '^'}### ?({question}|{answer}):"
        rf"|^### ?(System{'|Input' if question == 'Instruction' else ''}):",
        re.MULTILINE,
    )
    for question, answer in _MARKS
]


def is_marked_text(text: str) -> bool:
    return _marks_of(text) is not None


def marked_text_row(values: dict[str, Any]) -> list[ChatMessage]:
    """Parse `{"text": "### Human: question ### Assistant: answer ..."}`; see `_MARKS` for the marks.

    The text before the first mark, or after `### System:`, is the system prompt. A question without an answer at the
    end is left out: published sets have them.

    Raises:
        ValueError: the text has no marks or no answer, the marks do not take turns, or a question or answer is empty.
    """
    text = _text(values, "text")
    marks = _marks_of(text)
    if marks is None:
        spellings = ", ".join(f"### {question}: ... ### {answer}: ..." for question, answer in _MARKS)
        raise ValueError(f"'text' is none of {spellings}: {shown(text)}")
    pattern, question = marks
    messages = [{"role": "system", "content": ""}]
    position = 0
    for mark in pattern.finditer(text):
        last = messages[-1]
        turn, part = mark.groups()
        if part is not None and part != {"system": "System", "user": "Input"}.get(last["role"]):
            continue  # a heading of the text itself
        last["content"] = _joined(last["content"], text[position : mark.start()].strip())
        position = mark.end()
        if turn is not None:
            messages.append({"role": "user" if turn == question else "assistant", "content": ""})
    messages[-1]["content"] = _joined(messages[-1]["content"], text[position:].strip())
    if messages[-1]["role"] == "user" and len(messages) > 2:
        messages.pop()
    return _dialog(messages)


def _marks_of(text: str) -> tuple[re.Pattern[str], str] | None:
    """Find the pattern of the text's marks and its mark of a question; None for a text without both marks."""
    found = []
    for pattern, (question, answer) in zip(_MARK_PATTERNS, _MARKS, strict=True):
        marks = [mark for mark in pattern.finditer(text) if mark[1]]
        if marks and marks[0][1] == question and any(mark[1] == answer for mark in marks):
            found.append((marks[0].start(), pattern, question))
    return min(found, key=lambda marks: marks[0])[1:] if found else None


def text_row(values: dict[str, Any]) -> list[ChatMessage]:
    """Convert `{"text"}` without prompt and answer: every token is trained.

    Raises:
        ValueError: it is empty or not text.
    """
    text = _text(values, "text")
    if not text.strip():
        raise ValueError("'text' is empty")
    return [ChatMessage(PLAIN_TEXT_ROLE, text)]


def _dialog(messages: list[dict[str, Any]]) -> list[ChatMessage]:
    """Check that messages take turns and end with an answer; an empty system message is left out."""
    if messages and messages[0].get("role") == "system" and _is_blank(messages[0].get("content")):
        messages = messages[1:]
    checked = chat_messages(messages)
    for number, message in enumerate(checked, 1):
        if not message.content.strip():
            raise ValueError(f"message {number}, of role {message.role!r}, is empty")
    if checked[-1].role != "assistant":
        raise ValueError(f"the last message is the user's, there is no answer to learn: {shown(checked[-1].content)}")
    return checked


def _exchange(question: Any, answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def with_system(convert: RowConverter) -> RowConverter:
    """Make a converter that adds the `system` column to a dialog without a system message."""

    def convert_row(values: dict[str, Any]) -> list[ChatMessage]:
        messages = convert(values)
        system = _optional_text(values, "system")
        return with_system_message(messages, system if system.strip() else None)

    return convert_row


def _dicts(values: dict[str, Any], column: str) -> list[dict[str, Any]]:
    entries = _column(values, column)
    if not isinstance(entries, list):
        raise ValueError(f"{column!r} holds {shown(entries)} where a list is due")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise ValueError(f"message {number} is {shown(entry)} where an object with role and content is due")
    return entries


def _text(values: dict[str, Any], column: str) -> str:
    text = _column(values, column)
    if not isinstance(text, str):
        raise ValueError(f"{column!r} holds {shown(text)} where text is due")
    return text


def _optional_text(values: dict[str, Any], column: str) -> str:
    return "" if values.get(column) is None else _text(values, column)


def _column(values: dict[str, Any], column: str) -> Any:
    if column not in values:
        raise ValueError(f"there is no column {column!r}, but {listed(values)}")
    return values[column]


def _joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part.strip())


def _is_blank(content: Any) -> bool:
    return content is None or (isinstance(content, str) and not content.strip())


def listed(names: Collection[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names)) or "none"


def shown(value: Any) -> str:
    """Shorten a value to 60 characters, for an error message."""
    return repr(value[:60] if isinstance(value, str) else value)[:62]
