"""The state of a conversation: its exchanges, and a cache that is read again only from where it differs."""

import contextlib
import dataclasses
from collections.abc import Generator, Sequence
from itertools import takewhile

from custom_components.generation.decoding import streamed_answer
from custom_components.generation.incremental import IncrementalLlama, KeyValueCache
from custom_components.generation.sampling import Sampling
from custom_components.runtime.errors import UserError
from custom_components.transforms.chat_transform import ChatTransform, prompt_tokens
from custom_components.transforms.dialogs import chat_messages


class Conversation:
    """The exchanges so far, and what the model has read of them.

    Attributes:
        system_prompt: None: the tokenizer's.
        exchanges: questions and their answers, those that the model is still shown.
        forgotten: the exchanges before them, which no longer fit the context.
    """

    def __init__(
        self, model: IncrementalLlama, tokenizer: ChatTransform, max_new_tokens: int, sampling: Sampling
    ) -> None:
        self.system_prompt: str | None = None
        self.exchanges: list[tuple[str, str]] = []
        self.forgotten: list[tuple[str, str]] = []
        self._last_question: str | None = None
        self._is_last_kept = False
        self._num_retries = 0
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
            self.forgotten += self.exchanges[:num_forgotten]
            del self.exchanges[:num_forgotten]
            return num_forgotten
        raise AssertionError

    @property
    def draws(self) -> bool:
        """Whether another answer to the same question may differ."""
        return self._sampling.temperature > 0

    def reset(self) -> None:
        """Forget all exchanges; the system prompt stays."""
        self.exchanges.clear()
        self.forgotten.clear()
        self._last_question = None

    def take_back(self) -> str | None:
        """Take the last question and its answer out of the history, to be asked again with another seed.

        Returns:
            the question; None where there is none.
        """
        question = self._last_question
        if question is not None:
            self._num_retries += 1
            if self.exchanges and self.exchanges[-1][0] == question and self._is_last_kept:
                del self.exchanges[-1]
        return question

    def messages(self) -> list[dict[str, str]]:
        """All that was said, as a row of a data set: the system prompt, and the exchanges that were forgotten too."""
        system_prompt = self._tokenizer.system_prompt if self.system_prompt is None else self.system_prompt
        dialog = self._dialog([*self.forgotten, *self.exchanges])
        messages = [message for message in dialog if message["role"] != "system"]
        return [{"role": "system", "content": system_prompt}, *messages] if system_prompt else messages

    def answer(self, question: str) -> Generator[str]:
        """Yield the answer in pieces of text.

        The part received so far is kept in the history, also if the caller stops early. An answer that contains the
        template's own markup is not kept: no dialog can hold it.
        """
        if question != self._last_question:
            self._num_retries = 0
        self._last_question, self._is_last_kept = question, False
        sampling = dataclasses.replace(self._sampling, seed=self._sampling.seed + self._num_retries)
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
                sampling,
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
                self._is_last_kept = True

    def _dialog(self, exchanges: Sequence[tuple[str, str]], question: str | None = None) -> list[dict[str, str]]:
        dialog = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        for asked, answered in exchanges:
            dialog += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return dialog if question is None else [*dialog, {"role": "user", "content": question}]

    def _rewind_cache(self, tokens: list[int]) -> None:
        """Keep the cache of the beginning that the tokens share with it; their last is read again, for its logits."""
        pairs = zip(self._read_tokens[: self._cache.num_tokens], tokens[:-1], strict=False)
        self._cache.num_tokens = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self._read_tokens = list(tokens)
