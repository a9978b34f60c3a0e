"""How rows spell a dialog: recognised from their columns, and turned into messages."""

import re
from collections.abc import Callable, Collection
from typing import Any

from custom_components.prompts import ChatMessage, chat_messages

RowConverter = Callable[[dict[str, Any]], list[ChatMessage]]


def messages_row(values: dict[str, Any]) -> list[ChatMessage]:
    """`{"messages": [{"role", "content"}, ...]}`, OpenAI's form.

    Raises:
        ValueError: it is no dialog, has an empty message, or does not end with an answer.
    """
    if not isinstance(values["messages"], list):
        raise ValueError(f"'messages' holds {values['messages']!r} where a list is due")
    messages = chat_messages(values["messages"])
    for index, message in enumerate(messages):
        if not message.content.strip():
            raise ValueError(f"message {index + 1}, of role {message.role!r}, is empty")
    if messages[-1].role != "assistant":
        raise ValueError("the last message is the user's, there is no answer to learn")
    return messages


_LLAMA2_TURN = re.compile(r"\s*(?:<s>)?\s*\[INST\](.*?)\[/INST\](.*?)(?:</s>|$)", re.DOTALL)
_LLAMA2_SYSTEM = re.compile(r"\s*<<SYS>>\n?(.*?)\n?<</SYS>>\s*(.*)", re.DOTALL)


def llama2_text_row(values: dict[str, Any]) -> list[ChatMessage]:
    """`{"text": "<s>[INST] question [/INST] answer </s><s>[INST] ..."}`, already in Llama 2's format, parsed back.

    Empty questions and answers are kept: published sets have them.

    Raises:
        ValueError: the text does not follow the format to its end.
    """
    text = values["text"]
    if not isinstance(text, str):
        raise ValueError(f"'text' holds {text!r} where text is due")
    messages: list[ChatMessage] = []
    position = 0
    while text[position:].strip():
        match = _LLAMA2_TURN.match(text, position)
        if match is None:
            raise ValueError(f"'text' leaves the form <s>[INST] ... [/INST] ... </s> at {text[position : position + 60]!r}")
        user, answer = match[1].strip(), match[2].strip()
        if not messages and (system := _LLAMA2_SYSTEM.fullmatch(user)):
            messages.append(ChatMessage("system", system[1]))
            user = system[2]
        messages += [ChatMessage("user", user), ChatMessage("assistant", answer)]
        position = match.end()
    if not messages:
        raise ValueError("'text' is empty")
    return messages


def recognised_format(columns: Collection[str]) -> tuple[str, RowConverter]:
    """The format's name and its converter for rows of these columns.

    Raises:
        ValueError: no format has these columns.
    """
    if "messages" in columns:
        return "messages", messages_row
    if "text" in columns:
        return "Llama-2 text", llama2_text_row
    raise ValueError(f"rows have the columns {sorted(columns)}; known are 'messages' and 'text' with [INST]")
