"""A chat: messages in, answers out, and the commands between them."""

import json
import sys
from pathlib import Path
from typing import TextIO

from custom_components.generation.chat_input import messages_of
from custom_components.generation.conversation import Conversation
from custom_components.runtime.terminal import say

HELP = """\
/retry          answer the last question again, drawn anew
/reset          forget the conversation
/system TEXT    set the system prompt; without TEXT, restore the trained one
/save FILE      write the conversation as a row to train on; overwrites nothing
/help           this
/exit           exit; so does the end of the input
//TEXT          a message that begins with a slash
\"\"\"             begins and ends a message of several lines; a paste is one message
Ctrl-C stops an answer; between answers it exits."""


def chat(conversation: Conversation, lines: TextIO, *, is_interactive: bool) -> None:
    """Answer message after message until the end of the input or `/exit`. Answers go to stdout, all else to stderr.

    Args:
        is_interactive: show a prompt before each line, and let Ctrl-C stop an answer; otherwise it exits.
    """
    if is_interactive:
        note("/help for commands")
    for message in messages_of(lines, is_interactive=is_interactive):
        if message.startswith("/") and not message.startswith("//") and "\n" not in message:
            if message == "/exit":
                return
            obey(conversation, message, is_interactive)
        else:
            answer_message(conversation, message.removeprefix("/"), is_interactive)


def obey(conversation: Conversation, line: str, is_interactive: bool) -> None:
    """Do what a `/command` says."""
    command, _, text = line.partition(" ")
    text = text.strip()
    if command == "/reset":
        conversation.reset()
        note("the conversation is forgotten")
    elif command == "/system":
        conversation.system_prompt = text or None
        note("the system prompt is set" if text else "the trained system prompt is restored")
    elif command == "/retry":
        retry(conversation, is_interactive)
    elif command == "/save":
        save(conversation, text)
    else:
        if command != "/help":
            note(f"there is no command {command!r}")
        note(HELP)


def retry(conversation: Conversation, is_interactive: bool) -> None:
    """Answer the last question again."""
    question = conversation.take_back()
    if question is None:
        note("there is no question to answer again")
        return
    if not conversation.draws:
        note("at temperature 0 the answer is always the likeliest one; temperature=0.7 on the command line draws")
    answer_message(conversation, question, is_interactive)


def save(conversation: Conversation, name: str) -> None:
    """Write the conversation as one line of JSON, as `dataset.source` and `prompts_file` read it."""
    messages = conversation.messages()
    if not name:
        note("error: /save needs a file name, as in /save chat.jsonl")
        return
    if not any(message["role"] == "assistant" for message in messages):
        note("there is nothing to save yet")
        return
    try:
        with Path(name).expanduser().open("x", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except FileExistsError:
        note(f"error: {name!r} is there already; save under another name")
    except (OSError, RuntimeError, ValueError) as error:  # no such directory, no such user, a name that cannot be
        note(f"error: {name!r} cannot be written ({getattr(error, 'strerror', None) or error})")
    else:
        note(f"saved {name}")


def answer_message(conversation: Conversation, question: str, is_interactive: bool) -> None:
    """Print the answer as it comes; a question that cannot be asked gets its `error:` line and no answer."""
    try:
        num_forgotten = conversation.forget_what_does_not_fit(question)
    except ValueError as error:
        note(f"error: {error}")
        return
    if num_forgotten:
        note(f"the context is full: the oldest {num_forgotten} of the exchanges are forgotten")
    num_kept = len(conversation.exchanges)
    pieces = conversation.answer(question)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()
        if not is_interactive:
            raise
    print(flush=True)
    if len(conversation.exchanges) == num_kept:
        note("the answer contains prompt-format markup, so this exchange is forgotten")


def note(text: str) -> None:
    """Print a line about the chat, not of it."""
    say(text, sys.stderr)
