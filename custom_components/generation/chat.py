"""A conversation with a model: history, commands, and a cache that is read again only from where it differs."""

import contextlib
import sys
from collections.abc import Generator, Sequence
from itertools import takewhile
from typing import TextIO

from custom_components.generation.decoding import streamed_answer
from custom_components.generation.incremental import IncrementalLlama, KeyValueCache
from custom_components.generation.sampling import Sampling
from custom_components.runtime.errors import UserError
from custom_components.transforms.dialogs import chat_messages
from custom_components.transforms.llama2_chat import Llama2ChatTransform, prompt_tokens

HELP = """\
/reset          forget the conversation
/system TEXT    set the system prompt; without TEXT, restore the trained one
/help           this
/exit           exit; so does the end of the input
//TEXT          a message that begins with a slash
Ctrl-C stops an answer; between answers it exits."""


class Conversation:
    """The exchanges so far, and what the model has read of them.

    Attributes:
        system_prompt: None: the tokenizer's.
        exchanges: questions and their answers.
    """

    def __init__(
        self, model: IncrementalLlama, tokenizer: Llama2ChatTransform, max_new_tokens: int, sampling: Sampling
    ) -> None:
        self.system_prompt: str | None = None
        self.exchanges: list[tuple[str, str]] = []
        self._model = model
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._sampling = sampling
        self._cache = KeyValueCache()
        self._read_tokens: list[int] = []

    def forget_what_does_not_fit(self, question: str) -> int:
        """Drop the oldest exchanges until question and answer fit the context; returns how many.

        Raises:
            UserError: the question leaves no room for an answer even without any history. Nothing is dropped then.
            ValueError: the question contains the template's own markup.
        """
        # An answer needs room, but a large `max_new_tokens` must not push the whole history out.
        room = min(self._max_new_tokens, self._model.max_seq_len // 2)
        last = len(self.exchanges)
        for num_forgotten in range(last + 1):
            dialog = self._dialog(self.exchanges[num_forgotten:], question)
            max_seq_len = self._model.max_seq_len - (room - 1 if num_forgotten < last else 0)
            try:
                prompt_tokens(self._tokenizer, dialog, max_seq_len)
            except UserError:
                if num_forgotten == last:
                    raise
                continue
            del self.exchanges[:num_forgotten]
            return num_forgotten
        raise AssertionError

    def answer(self, question: str) -> Generator[str]:
        """Yield the answer in pieces of text.

        The part received so far is kept in the history, also if the caller stops early. An answer that contains the
        template's own markup is not kept: no dialog can hold it.
        """
        dialog = self._dialog(self.exchanges, question)
        tokens = prompt_tokens(self._tokenizer, dialog, self._model.max_seq_len)
        self._rewind_cache(tokens)
        pieces: list[str] = []
        try:
            for piece in streamed_answer(
                self._model,
                self._tokenizer,
                tokens,
                self._max_new_tokens,
                self._sampling,
                self._cache,
                self._read_tokens,
            ):
                pieces.append(piece)
                yield piece
        finally:
            exchange = (question, "".join(pieces))
            with contextlib.suppress(ValueError):
                self._tokenizer.render(chat_messages(self._dialog([exchange], question)))
                self.exchanges.append(exchange)

    def _dialog(self, exchanges: Sequence[tuple[str, str]], question: str) -> list[dict[str, str]]:
        dialog = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        for asked, answered in exchanges:
            dialog += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return [*dialog, {"role": "user", "content": question}]

    def _rewind_cache(self, tokens: list[int]) -> None:
        """Keep the cache of the beginning that the tokens share with it; their last is read again, for its logits."""
        pairs = zip(self._read_tokens[: self._cache.num_tokens], tokens[:-1], strict=False)
        self._cache.num_tokens = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self._read_tokens = list(tokens)


def chat(conversation: Conversation, lines: TextIO, *, is_interactive: bool) -> None:
    """Answer line after line until the end of the input or `/exit`. Answers go to stdout, all else to stderr.

    Args:
        is_interactive: show a prompt before each line, and let Ctrl-C stop an answer; otherwise it exits.
    """
    if is_interactive:
        say("/help for commands")
    while (line := next_line(lines, is_interactive)) is not None:
        line = line.strip()
        if line.startswith("/") and not line.startswith("//"):
            if line == "/exit":
                return
            obey(conversation, line)
        elif line:
            answer_line(conversation, line.removeprefix("/"), is_interactive)


def next_line(lines: TextIO, is_interactive: bool) -> str | None:
    """Read the next line; None at the end of the input."""
    if not is_interactive:
        return lines.readline() or None
    try:
        return input("> ")
    except EOFError:
        print()
        return None


def obey(conversation: Conversation, line: str) -> None:
    """Do what a `/command` says."""
    command, _, text = line.partition(" ")
    if command == "/reset":
        conversation.exchanges.clear()
        say("the conversation is forgotten")
    elif command == "/system":
        conversation.system_prompt = text.strip() or None
        say("the system prompt is set" if text.strip() else "the trained system prompt is restored")
    else:
        if command != "/help":
            say(f"there is no command {command!r}")
        say(HELP)


def answer_line(conversation: Conversation, question: str, is_interactive: bool) -> None:
    """Print the answer as it comes; a question that cannot be asked gets its `error:` line and no answer."""
    try:
        num_forgotten = conversation.forget_what_does_not_fit(question)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return
    if num_forgotten:
        say(f"the context is full: the oldest {num_forgotten} of the exchanges are forgotten")
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
        say("the answer contains prompt-format markup, so this exchange is forgotten")


def say(text: str) -> None:
    """Print a line about the chat, not of it."""
    print(text, file=sys.stderr, flush=True)
