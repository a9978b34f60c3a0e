"""The messages of a dialog, and the checks of their roles, order and text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchtune.data import Message

from custom_components.transforms.training_marks import mark_keys, marked_as_trained, names_of


@dataclass(frozen=True)
class ChatMessage:
    """One message. A row of plain text, without prompt or answer, is one message of role "text".

    Attributes:
        is_supervised: what the row says of this message: False for an answer that is shown but not learned, as
            `weight: 0` in OpenAI's rows; None: nothing, so `train_on` decides.
        instruction_and_input: the two parts that `content` joins, of a question of Alpaca's, for templates that write
            them apart.
        mark: the key of the row that says whether it is supervised, for errors.

    Raises:
        ValueError: the content has half a surrogate pair.
    """

    role: str
    content: str
    is_supervised: bool | None = None
    instruction_and_input: tuple[str, str] | None = None
    mark: str = ""

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
    """Check messages, given as dicts (`{"role", "content"}`), as :class:`ChatMessage` or as torchtune's Message.

    Raises:
        ValueError: an unknown role, content that is not text, a mark that is neither 0 nor 1, a system message that is
            not the first, or roles that do not take turns. The error names the message.
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


def check_marks(dialog: Sequence[ChatMessage], trains_prompts: bool) -> None:
    """Refuse marks that the transform's `train_on` cannot honour.

    Args:
        trains_prompts: `train_on` is "all".

    Raises:
        ValueError: a prompt is to be trained where only answers are, or one part of a prompt and not the other.
    """
    for number, message in enumerate(dialog, 1):
        if message.is_supervised and message.role in ("system", "user") and not trains_prompts:
            by = f" by {message.mark}" if message.mark else ""
            raise ValueError(
                f"message {number}, of role {message.role!r}, is marked to be trained{by}, and only answers are; "
                "set train_on: all, or remove the mark (torchtune: train_on_input: false)"
            )
    if trains_prompts and dialog[0].role == "system":
        system_is_masked, question_is_masked = (message.is_supervised is False for message in dialog[:2])
        if system_is_masked != question_is_masked:
            raise ValueError(
                "of the system prompt and the first question one is marked as not trained; they are one prompt, so "
                "mark both or neither"
            )


def check_torchtune_masks(messages: Sequence[Any], trains_prompts: bool) -> None:
    """Refuse prompts that torchtune's `train_on_input: false` masks where `train_on: all` trains them.

    Raises:
        ValueError: one of torchtune's Messages that is no answer is masked, and `trains_prompts`.
    """
    for number, message in enumerate(messages, 1):
        if trains_prompts and isinstance(message, Message) and message.masked and message.role != "assistant":
            raise ValueError(
                f"message {number}, of role {message.role!r}, is masked, and train_on: all trains prompts; "
                "set train_on: assistant, or train_on_input: true"
            )


def _chat_message(message: Any, name: str) -> ChatMessage:
    if isinstance(message, ChatMessage):
        return message
    if isinstance(message, Mapping):
        if not {"role", "content"} <= set(message):
            raise ValueError(f"{name} has the keys {sorted(message)}, it needs 'role' and 'content'")
        marks = mark_keys(message)
        unknown = sorted(key for key in message if key not in ("role", "content", *marks) and message[key])
        if unknown:
            raise ValueError(f"{name} has {unknown}, which cannot be trained; only role, content and weight can")
        role, content = message["role"], message["content"]
        is_supervised, mark = marked_as_trained(message, marks, name), names_of(marks)
    else:
        assert isinstance(message, Message)
        role, content, is_supervised, mark = message.role, message.text_content, not message.masked, "'masked'"
    if role not in ROLES:
        raise ValueError(f"{name} is of role {str(role)[:60]!r}, not one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"{name} holds {str(content)[:60]} where text is due")
    return ChatMessage(role, content, is_supervised, mark=mark)
