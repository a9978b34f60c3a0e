"""Dialogs as text: what is shown to the model, what it has to answer, and where one ends and the other begins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ChatMessage:
    """One message. `is_trained` is False for an answer that is shown but not learned (`weight: 0` in OpenAI's rows)."""

    role: str
    content: str
    is_trained: bool = True


@dataclass(frozen=True)
class Turn:
    """A prompt and its answer as they are tokenized: BOS + prompt + answer + EOS.

    An open turn, the last of a dialog that asks for an answer, has answer None and no EOS.
    """

    prompt: str
    answer: str | None
    is_trained: bool = True


def chat_messages(messages: Sequence[Any]) -> list[ChatMessage]:
    """Messages as dicts (`{"role", "content"}`) or as torchtune's Message objects, checked.

    Raises:
        ValueError: an unknown role, content that is no text, a system message that is not the first, roles that do not
            take turns. The text says which message.
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


def _chat_message(message: Any, name: str) -> ChatMessage:
    if isinstance(message, Mapping):
        unknown = set(message) - {"role", "content", "weight"}
        if not {"role", "content"} <= set(message):
            raise ValueError(f"{name} has the keys {sorted(message)}, it needs 'role' and 'content'")
        role, content, weight = message["role"], message["content"], message.get("weight")
        if unknown and any(message[key] for key in unknown):
            raise ValueError(f"{name} has {sorted(unknown)}, which cannot be trained; only role, content and weight can")
    else:  # torchtune.data.Message
        role, content, weight = message.role, message.text_content, None
    if role not in ROLES:
        raise ValueError(f"{name} is of role {role!r}, not one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"{name} holds {content!r} where text is due")
    if weight not in (None, 0, 1):
        raise ValueError(f"{name} has weight {weight!r}, which is neither 0 nor 1")
    return ChatMessage(role, content, weight != 0)


LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


def llama2_turns(messages: Sequence[ChatMessage]) -> list[Turn]:
    """A dialog in Llama 2's chat format.

    Meta's `chat_completion`, repository meta-llama/llama @689c7f2, llama/generation.py: the system prompt goes inside
    the first user message, `strip()` is applied to the folded text, one space stands before and after the answer.

    Raises:
        ValueError: for a message that contains one of the format's tags, as Meta refuses it.
    """
    for message in messages:
        if tag := next((tag for tag in LLAMA2_TAGS if tag in message.content), None):
            raise ValueError(f"a {message.role} message contains {tag!r}, which is how the chat format marks its parts")
    turns = []
    system = messages[0].content if messages[0].role == "system" else None
    rest = messages[1:] if system is not None else messages
    for index in range(0, len(rest), 2):
        user = rest[index].content
        if index == 0 and system is not None:
            user = f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}"
        prompt = f"[INST] {user.strip()} [/INST]"
        if index + 1 == len(rest):
            turns.append(Turn(prompt, None))
        else:
            answer = rest[index + 1]
            turns.append(Turn(prompt, f" {answer.content.strip()} ", answer.is_trained))
    return turns
