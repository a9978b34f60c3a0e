"""A row's messages as a dialog to train on: turns in order, what is left out, what is refused."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from custom_components.datasets.row_messages import RowMessage, RowNotes, shown
from custom_components.transforms.dialogs import ChatMessage

OnUnevenTurns = Literal["error", "merge", "drop_leading"]
OnEmptyAnswer = Literal["drop", "error"]

OPEN_QUESTION = "open last question{s} left out"
ROW_WITHOUT_ANSWER = "dropped (empty answer)"
EMPTY_ANSWER = "empty answer{s} within a dialog shown and not trained"
EMPTY_QUESTION = "with an empty question"
MERGED = "turn{s} joined to the turn before, of the same role"
LEADING = "answer{s} before the first question left out"
UNTRAINED_ANSWER = "answer{s} marked as not trained"


@dataclass(frozen=True)
class DialogRules:
    """What becomes of dialogs that are not quite one.

    Attributes:
        on_uneven_turns: "merge" joins turns of one role in a row; "drop_leading" does so too and leaves out what the
            assistant says before the first question.
        on_empty_answer: "drop" leaves out a row without an answer; in a dialog an empty answer is shown, not trained.
    """

    on_uneven_turns: OnUnevenTurns = "error"
    on_empty_answer: OnEmptyAnswer = "drop"


def trained_dialog(
    messages: Sequence[RowMessage], rules: DialogRules, notes: RowNotes, *, takes_empty_questions: bool
) -> list[ChatMessage]:
    """Check that messages take turns and end with an answer; an open question at the end is left out.

    Returns:
        the dialog; empty if it has no answer that is not empty, and the rules drop such rows.

    Raises:
        ValueError: there are no messages, they do not take turns, none is an answer, or a question is empty; the error
            says where.
    """
    messages = dialog_in_turns(messages, rules, notes)
    if messages[-1].role == "user":
        if not any(message.role == "assistant" for message in messages):
            content = messages[-1].content
            raise ValueError(f"the last message is of role 'user', there is no answer to learn: {shown(content)}")
        notes.counted.append(OPEN_QUESTION)
        messages = messages[:-1]
    checked = [_checked_message(message, rules, notes, takes_empty_questions) for message in messages]
    if all(not message.content.strip() for message in checked if message.role == "assistant"):
        notes.counted = [ROW_WITHOUT_ANSWER]
        return []
    return checked


def dialog_in_turns(messages: Sequence[RowMessage], rules: DialogRules, notes: RowNotes) -> list[RowMessage]:
    """Put messages in order as the rules say, and check that they take turns; an empty system message is left out.

    Raises:
        ValueError: there are no messages, or they do not take turns.
    """
    if messages and messages[0].role == "system" and not messages[0].content.strip():
        messages = messages[1:]
    if not messages:
        raise ValueError("there are no messages")
    if rules.on_uneven_turns != "error":
        messages = _merged(messages, notes)
    system = [message for message in messages[:1] if message.role == "system"]
    turns = list(messages[len(system) :])
    if not turns:
        raise ValueError("there is a system message and nothing else")
    if rules.on_uneven_turns == "drop_leading" and turns[0].role == "assistant":
        notes.counted.append(LEADING)
        turns = turns[1:]
        if not turns:
            raise ValueError("there is no question, only what the assistant says first")
    for index, message in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if message.role != expected:
            raise ValueError(_wrong_turn(message, expected, is_first=index == 0))
    return [*system, *turns]


def named(message: RowMessage) -> str:
    """Name a message in an error: by its column, or by its number and role."""
    return f"{message.place}, of role {message.role!r}," if message.place.startswith("message") else message.place


def _wrong_turn(message: RowMessage, expected: str, is_first: bool) -> str:
    if message.role == "system":
        return f"{message.place} is of role 'system' where {expected!r} is due; only the first message can be"
    way_out = "drop_leading leaves out what comes before the first question" if is_first else "merge joins such turns"
    return f"{message.place} is of role {message.role!r} where {expected!r} is due; on_uneven_turns={way_out}"


def _merged(messages: Sequence[RowMessage], notes: RowNotes) -> list[RowMessage]:
    merged: list[RowMessage] = []
    for message in messages:
        if not merged or merged[-1].role != message.role:
            merged.append(message)
            continue
        last = merged[-1]
        if last.is_supervised != message.is_supervised:
            raise ValueError(f"{last.place} and {message.place} are one turn, but only one is marked as trained or not")
        content = "\n\n".join(text for text in (last.content, message.content) if text.strip())
        merged[-1] = last._replace(content=content, instruction_and_input=None)
        notes.counted.append(MERGED)
    return merged


def _checked_message(
    message: RowMessage, rules: DialogRules, notes: RowNotes, takes_empty_questions: bool
) -> ChatMessage:
    is_supervised = message.is_supervised
    if message.role == "assistant" and is_supervised is False:
        notes.counted.append(UNTRAINED_ANSWER)
    if not message.content.strip():
        if message.role == "assistant" and rules.on_empty_answer == "drop":
            notes.counted.append(EMPTY_ANSWER)
            is_supervised = False
        elif message.role == "user" and takes_empty_questions:
            notes.counted.append(EMPTY_QUESTION)
        else:
            raise ValueError(f"{named(message)} is empty")
    return ChatMessage(message.role, message.content, is_supervised, message.instruction_and_input, message.mark)
