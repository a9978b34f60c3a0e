"""A checkpoint's own Jinja template as a prompt template: what of a rendered dialog is whose text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from custom_components.transforms.dialogs import ChatMessage
from custom_components.transforms.jinja_rendering import render_chat
from custom_components.transforms.turns import EOS, Markup, Text, Turn, split_trailing_spaces, without_empty

# Stands for the content of a message while a dialog is rendered; of Unicode's private use.
_PLACE = "\ue000{}\ue001"
_PLACES = re.compile("\ue000(\\d+)\ue001")
_QUESTIONS = ("Why?", "And\n\nthen - what  now?", "Ok.")
_ANSWERS = ("So.", "Later, é.", "Yes.")


@dataclass(frozen=True)
class JinjaTemplate:
    """A Jinja template of which every prompt is the beginning of the dialog that follows.

    Attributes:
        source: the template's text.
        names: the texts of tokens by transformers' names.
        control_tokens: names in rendered texts that are control tokens.
    """

    source: str
    names: dict[str, str] = field(default_factory=lambda: {"bos_token": "<s>", "eos_token": "</s>"})
    control_tokens: tuple[str, ...] = ()

    def with_names(self, bos: str | None, eos: str, control_tokens: Sequence[str]) -> "JinjaTemplate":
        """Make the template for a tokenizer, by the names of its tokens; see :class:`MarkedTemplate`."""
        names = {"bos_token": bos or "", "eos_token": eos}
        return replace(self, names=names, control_tokens=tuple(control_tokens))

    @cached_property
    def strips(self) -> dict[str, bool]:
        """Find whether the template strips messages of spaces around them, by role.

        Raises:
            ValueError: it changes messages in another way.
        """
        found = {}
        for role in ("user", "assistant", "system"):
            messages = _dialog(2, has_system=role == "system")
            place = next(message for message in messages if message["role"] == role)
            try:
                rendered = self._render(
                    [{**m, "content": f" \n{m['content']}\n "} if m is place else m for m in messages]
                )
            except ValueError:
                found[role] = False  # a template without system prompts
                continue
            written, stripped = f" \n{place['content']}\n ", place["content"]
            if written not in rendered and stripped not in rendered:
                raise ValueError(f"it changes the text of {role} messages")
            found[role] = written not in rendered
        return found

    @property
    def begins_with_bos(self) -> bool:
        bos = self.names["bos_token"]
        return bool(bos) and self._render(_dialog(1)).startswith(bos)

    @property
    def end_tokens(self) -> tuple[str, ...]:
        """The control token that ends an answer, by its name; none: nothing but the EOS after it."""
        [turn] = self(_chat_messages(_dialog(1)))
        assert turn.answer is not None
        return tuple(name for name in self.control_tokens if str(turn.answer[-1]).endswith(name))[:1]

    def check(self) -> None:
        """Prove on dialogs of one to three exchanges that every prompt is the beginning of what follows.

        Raises:
            ValueError: it is not; masks would not be those of the positions. Or the template fails.
        """
        has_system = True
        try:
            self._render(_dialog(1, has_system=True))
        except ValueError:
            has_system = False
        assert self.strips
        for with_system in {False, has_system}:
            for num_exchanges in (1, 2, 3):
                self(_chat_messages(_dialog(num_exchanges, has_system=with_system)))

    def __call__(self, messages: Sequence[ChatMessage]) -> list[Turn]:
        places = [{"role": m.role, "content": _PLACE.format(index)} for index, m in enumerate(messages)]
        contents = [m.content.strip() if self.strips.get(m.role) else m.content for m in messages]
        whole = self._render(places, is_open=messages[-1].role == "user")
        text = _TextOf(whole, contents)
        turns: list[Turn] = []
        start = 0
        for index in range(len(messages)):
            if messages[index].role != "user":
                continue
            prompt = self._render(places[: index + 1], is_open=True)
            if not whole.startswith(prompt):
                raise ValueError(
                    f"the chat template writes the prompt of message {index + 1} in another way once it is answered"
                )
            stripped, seam = split_trailing_spaces(text(start, len(prompt)))
            if index + 1 == len(messages):
                turns.append(Turn(stripped, None))
                break
            end, ending = self._end_of_answer(whole, len(prompt), index + 1)
            answer = without_empty((*seam, *text(len(prompt), end), *ending))
            turns.append(Turn(stripped, answer))
            start = end
        else:
            turns[-1] = replace(turns[-1], trailer=text(start, len(whole)))
        return turns

    def _end_of_answer(self, whole: str, start: int, index: int) -> tuple[int, Text]:
        """Find where an answer's end token ends; without one the answer is followed by EOS."""
        place = _PLACE.format(index)
        position = whole.find(place, start)
        if position < 0:
            raise ValueError(f"the chat template does not write message {index + 1} after its prompt")
        names = sorted({*self.control_tokens, self.names["eos_token"]}, key=len, reverse=True)
        rest = position + len(place)
        limit = _PLACES.search(whole, rest)
        found = re.compile("|".join(map(re.escape, names))).search(whole, rest, limit.start() if limit else len(whole))
        return (found.end(), ()) if found else (rest, (EOS,))

    def _render(self, messages: Sequence[dict[str, str]], *, is_open: bool = False) -> str:
        return render_chat(self.source, messages, self.names, is_open=is_open)


class _TextOf:
    """Gives parts of a rendered text, with contents in the places that stand for them."""

    def __init__(self, rendered: str, contents: Sequence[str]) -> None:
        self._rendered = rendered
        self._contents = contents

    def __call__(self, start: int, end: int) -> Text:
        parts: list[str] = []
        position = start
        for match in _PLACES.finditer(self._rendered, start, end):
            parts += [Markup(self._rendered[position : match.start()]), self._contents[int(match[1])]]
            position = match.end()
        return without_empty((*parts, Markup(self._rendered[position:end])))


def _dialog(num_exchanges: int, *, has_system: bool = False) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": "Be kind."}] if has_system else []
    for question, answer in list(zip(_QUESTIONS, _ANSWERS, strict=True))[:num_exchanges]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _chat_messages(messages: Sequence[dict[str, str]]) -> list[ChatMessage]:
    return [ChatMessage(message["role"], message["content"]) for message in messages]
