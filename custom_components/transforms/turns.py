"""Turns: what a template writes of a dialog, before it is tokenized."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from custom_components.transforms.dialogs import ChatMessage


class Markup(str):
    """Text of a template itself: a control token's name in it is the token, in any other text it is only text.

    `{bos}` and `{eos}` are the tokenizer's own BOS and EOS, whatever their names.
    """

    __slots__ = ()


# Texts of messages and of the template, in order.
Text = tuple[str, ...]

BOS, EOS = Markup("{bos}"), Markup("{eos}")


@dataclass(frozen=True)
class Turn:
    """A prompt and its answer, with their control tokens.

    The last turn of a dialog that waits for an answer is open: its answer is None.

    Attributes:
        answer: up to the token that ends it; trained as a whole.
        trailer: what follows the end of the dialog's last answer, which is not trained.
        is_supervised: False: the answer is shown and not trained.
        is_prompt_masked: the prompt is not trained even where prompts are.
    """

    prompt: Text
    answer: Text | None
    trailer: Text = ()
    is_supervised: bool = True
    is_prompt_masked: bool = False

    def opened(self) -> "Turn":
        """Leave the answer open, to be continued.

        Spaces at its end are left out: the tokenizer joins a space with the word after it.
        """
        assert self.answer is not None
        started = list(self.answer)
        while started and isinstance(started[-1], Markup):
            started.pop()
        return replace(self, answer=split_trailing_spaces(tuple(started))[0], trailer=())


def filled(part: str, content: str) -> Text:
    """Put a message's content into a part of a template."""
    before, _, after = part.partition("{content}")
    return without_empty((Markup(before), content, Markup(after)))


def split_trailing_spaces(text: Text) -> tuple[Text, Text]:
    """Split off the spaces at a text's end."""
    parts = list(text)
    spaces: list[str] = []
    while parts:
        last = parts.pop()
        stripped = last.rstrip(" ")
        spaces.insert(0, last[len(stripped) :])
        if stripped:
            parts.append(type(last)(stripped))
            break
    return without_empty(parts), without_empty(spaces)


def without_empty(parts: Sequence[str]) -> Text:
    return tuple(part for part in parts if part)


def exchanges(
    messages: Sequence[ChatMessage],
) -> tuple[str | None, list[tuple[ChatMessage, ChatMessage | None]]]:
    """Split a dialog into its system prompt and each user message with its answer, which the last may not have."""
    system = messages[0].content if messages[0].role == "system" else None
    rest = messages[1:] if system is not None else messages
    return system, list(zip_longest(rest[::2], rest[1::2]))


def text_of(turns: Sequence[Turn], bos: str, eos: str) -> str:
    """Write turns as one text.

    Args:
        bos, eos: how these tokens are written.
    """
    parts = [part for turn in turns for part in (*turn.prompt, *(turn.answer or ()), *turn.trailer)]
    return "".join(part.replace(BOS, bos).replace(EOS, eos) if isinstance(part, Markup) else part for part in parts)
