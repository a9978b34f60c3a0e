"""Rows with one column of text: a dialog in Llama 2's own format or with `###` marks, or prose."""

import re
from typing import Any

from custom_components.datasets.row_converters import joined, text_of
from custom_components.datasets.row_messages import RowMessage, RowNotes, shown
from custom_components.transforms.dialogs import PLAIN_TEXT_ROLE

# The </s> after an answer may be missing. Each \s* is followed by a non-space, so that no match is tried twice.
_LLAMA2_TURN = re.compile(r"\s*(?:<s>\s*)?\[INST\](.*?)\[/INST\](.*?)(?:</s>|(?=(?:<s>\s*)?\[INST\])|\Z)", re.DOTALL)
_LLAMA2_SYSTEM = re.compile(r"<<SYS>>\n?(.*?)\n?<</SYS>>\s*(.*)", re.DOTALL)
_LLAMA2_START = re.compile(r"\s*(?:<s>\s*)?\[INST\]")


def text_format(text: Any) -> str:
    """Name the format of a text: llama2_text, marked_text or text.

    Raises:
        ValueError: it is empty or not text.
    """
    if not isinstance(text, str):
        raise ValueError(f"'text' holds {shown(text)} where text is due")
    if not text.strip():
        raise ValueError("'text' is empty")
    if _LLAMA2_START.match(text):
        return "llama2_text"
    return "marked_text" if "###" in text and _marks_of(text) is not None else "text"


def llama2_text_row(values: dict[str, Any], notes: RowNotes) -> list[RowMessage]:
    """Parse `{"text": "<s>[INST] question [/INST] answer </s><s>[INST] ..."}`, text in Llama 2's own format.

    A last question with nothing after it, not even `</s>`, is open.

    Raises:
        ValueError: the text does not follow the format to its end.
    """
    text = text_of(values, "text").rstrip()
    messages: list[RowMessage] = []
    position = 0
    while position < len(text):
        match = _LLAMA2_TURN.match(text, position)
        if match is None:
            raise ValueError(f"'text' leaves the form <s>[INST] ... [/INST] ... </s> at {shown(text[position:])}")
        user, answer = match[1].strip(), match[2].strip()
        if not messages and (system := _LLAMA2_SYSTEM.fullmatch(user)):
            messages.append(RowMessage("system", system[1], "message 1"))
            user = system[2]
        position = match.end()
        messages.append(RowMessage("user", user, f"message {len(messages) + 1}"))
        if answer or position < len(text) or text.endswith("</s>"):
            messages.append(RowMessage("assistant", answer, f"message {len(messages) + 1}"))
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


def marked_text_row(values: dict[str, Any], notes: RowNotes) -> list[RowMessage]:
    """Parse `{"text": "### Human: question ### Assistant: answer ..."}`; see `_MARKS` for the marks.

    The text before the first mark, or after `### System:`, is the system prompt.

    Raises:
        ValueError: the text has no marks.
    """
    text = text_of(values, "text")
    marks = _marks_of(text)
    if marks is None:
        spellings = ", ".join(f"### {question}: ... ### {answer}: ..." for question, answer in _MARKS)
        raise ValueError(f"'text' is none of {spellings}: {shown(text)}")
    pattern, question = marks
    turns: list[tuple[str, list[str]]] = []
    role, position = "system", 0
    parts: list[str] = []
    for mark in pattern.finditer(text):
        turn, part = mark.groups()
        if part is not None and part != {"system": "System", "user": "Input"}.get(role):
            continue  # a heading of the text itself
        parts.append(text[position : mark.start()].strip())
        position = mark.end()
        if turn is not None:
            turns.append((role, parts))
            role, parts = "user" if turn == question else "assistant", []
    turns.append((role, [*parts, text[position:].strip()]))
    if not any(turns[0][1]):
        del turns[0]  # there is no system prompt
    return [_marked_message(number, *turn) for number, turn in enumerate(turns, 1)]


def _marked_message(number: int, role: str, parts: list[str]) -> RowMessage:
    has_input = role == "user" and len(parts) == 2 and all(parts)
    return RowMessage(role, joined(*parts), f"message {number}", None, (parts[0], parts[1]) if has_input else None)


def _marks_of(text: str) -> tuple[re.Pattern[str], str] | None:
    """Find the pattern of the text's marks and its mark of a question; None for a text without both marks."""
    found = []
    for pattern, (question, answer) in zip(_MARK_PATTERNS, _MARKS, strict=True):
        marks = [mark for mark in pattern.finditer(text) if mark[1]]
        if marks and marks[0][1] == question and any(mark[1] == answer for mark in marks):
            found.append((marks[0].start(), pattern, question))
    return min(found, key=lambda marks: marks[0])[1:] if found else None


def text_row(values: dict[str, Any], notes: RowNotes) -> list[RowMessage]:
    """Convert `{"text"}` without prompt and answer: every token is trained.

    Raises:
        ValueError: it is empty or not text.
    """
    text = text_of(values, "text")
    if not text.strip():
        raise ValueError("'text' is empty")
    return [RowMessage(PLAIN_TEXT_ROLE, text, "'text'")]


# Marks of dialogs that are not parsed: text that has them is trained as it is, prompts and marks included. Where there
# are two patterns, the second has to follow the first.
_FOREIGN_MARKS = {
    "<|im_start|>": (r"<\|im_start\|>",),
    "<|start_header_id|>": (r"<\|start_header_id\|>",),
    "<|user|>": (r"<\|(?:user|assistant|prompter|system)\|>",),
    "<start_of_turn>": (r"<start_of_turn>",),
    "[INST]": (r"\[INST\]|<<SYS>>",),
    "<human>:": (r"<(?:human|bot)>:",),
    "USER: ... ASSISTANT:": (r"\b(?:USER|HUMAN):", r"\b(?:ASSISTANT|AI):"),
    "Human: ... Assistant:": (r"^ *(?:Human|User): ", r"^ *(?:Assistant|AI|Bot|GPT): ?"),
    "Question: ... Answer:": (r"^ *(?:Question|Q): ", r"^ *(?:Answer|A): ?"),
    "### Question:": (
        r"^### ?(?i:Question|Answer|Instruction|Response|Input|Output|Human|Assistant|User|Prompt|Completion|Query)\b",
    ),
}
_FOREIGN_PATTERNS = {
    name: [re.compile(pattern, re.MULTILINE) for pattern in patterns] for name, patterns in _FOREIGN_MARKS.items()
}


def foreign_marks(text: str) -> list[str]:
    """Name the kinds of dialog marks, of other tools' formats, in a text that is trained as prose."""
    return [name for name, patterns in _FOREIGN_PATTERNS.items() if _follow_each_other(patterns, text)]


def _follow_each_other(patterns: list[re.Pattern[str]], text: str) -> bool:
    position = 0
    for pattern in patterns:
        match = pattern.search(text, position)
        if match is None:
            return False
        position = match.end()
    return True
