"""The messages of a dialog, and the checks of their roles, order and text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ChatMessage:
    """One message. `is_supervised` is False for an answer that is shown but not learned (`weight: 0` in OpenAI's rows).

    A row of plain text, without prompt or answer, is one message of role "text".

    Raises:
        ValueError: the content has half a surrogate pair.
    """

    role: str
    content: str
    is_supervised: bool = True

    def __post_init__(self) -> None:
        # JSON can spell half a surrogate pair, "\ud83d": a str to Python, but no tokenizer can encode it.
        try:
            self.content.encode()
        except UnicodeEncodeError as error:
            around = self.content[max(0, error.start - 30) : error.start + 30]
            raise ValueError(f"{self.role} message has half a surrogate pair, in {around!r}") from None


ROLES = ("system", "user", "assistant")
PLAIN_TEXT_ROLE = "text"


def chat_messages(messages: Sequence[Any]) -> list[ChatMessage]:
    """Check messages, given as dicts (`{"role", "content"}`) or as torchtune's Message objects.

    Raises:
        ValueError: an unknown role, content that is not text, a system message that is not the first, or roles that do
            not take turns. The error names the message.
    """
    checked = []
    for index, message in enumerate(messages):
        checked.append(_chat_message(message, f"message {index + 1}"))
    if not checked:
        raise ValueError("there are no messages")
    turns = checked[1:] if checked[0].role == "system" else checked
    for index, message in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if message.role != expected:
            number = len(checked) - len(turns) + index + 1
            raise ValueError(f"message {number} is of role {message.role!r} where {expected!r} is due")
    if not turns:
        raise ValueError("there is a system message and nothing else")
    return checked


def with_system_message(dialog: Sequence[ChatMessage], system_prompt: str | None) -> list[ChatMessage]:
    """Put a system message before a dialog that has none; None, or plain text: leave it as it is."""
    if system_prompt is None or dialog[0].role != "user":
        return list(dialog)
    return [ChatMessage("system", system_prompt), *dialog]


def _chat_message(message: Any, name: str) -> ChatMessage:
    if isinstance(message, Mapping):
        unknown = set(message) - {"role", "content", "weight"}
        if not {"role", "content"} <= set(message):
            raise ValueError(f"{name} has the keys {sorted(message)}, it needs 'role' and 'content'")
        role, content, weight = message["role"], message["content"], message.get("weight")
        if unknown and any(message[key] for key in unknown):
            raise ValueError(
                f"{name} has {sorted(unknown)}, which cannot be trained; only role, content and weight can"
            )
    else:  # torchtune.data.Message
        role, content, weight = message.role, message.text_content, None
    if role not in ROLES:
        raise ValueError(f"{name} is of role {str(role)[:60]!r}, not one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"{name} holds {str(content)[:60]} where text is due")
    if weight not in (None, 0, 1):
        raise ValueError(f"{name} has weight {weight!r}, which is neither 0 nor 1")
    return ChatMessage(role, content, weight != 0)
