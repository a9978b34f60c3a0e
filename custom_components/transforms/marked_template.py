"""A prompt template of marks around each message's content."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from custom_components.transforms.dialogs import ChatMessage
from custom_components.transforms.turns import (
    BOS,
    EOS,
    Markup,
    Text,
    Turn,
    exchanges,
    filled,
    split_trailing_spaces,
    without_empty,
)


@dataclass(frozen=True)
class MarkedTemplate:
    """A template of marks around each message's `{content}`.

    A turn's prompt is the system part (in the first turn), the user part, and the assistant part up to `{content}`.
    The control tokens that its texts name are tokens.

    A template that has `start`, or names BOS or EOS, has them only where it names them; its answers end with the first
    control token after their `{content}`, and what follows that is not trained. In any other template BOS is before
    every turn, and EOS after each answer and all of the assistant part.

    Attributes:
        system, user, assistant: text with one `{content}`; `{bos}` and `{eos}` are the tokenizer's.
        start: text at the start of every dialog, such as `{bos}`.
        default_system: the system prompt of dialogs without one; None: they get no system part.
        system_place: where the system part is: "before" the first user part, or before the content of the "first_user"
            or the "last_user" message. In a user's message an empty system prompt is none.
        strips: messages are stripped of spaces and line breaks around them: "all", or "spaces_after_answers".
        user_with_input: for a question that is an instruction and its input, with `{instruction}` and `{input}`; None:
            both are joined in `user`.
        default_system_with_input: instead of `default_system` where the first question has an input.
        control_tokens: names in its texts that are control tokens.
    """

    user: str
    assistant: str
    system: str = "{content}\n\n"
    start: str | None = None
    default_system: str | None = None
    system_place: Literal["before", "first_user", "last_user"] = "before"
    strips: Literal["nothing", "all", "spaces_after_answers"] = "nothing"
    user_with_input: str | None = None
    default_system_with_input: str | None = None
    control_tokens: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """Its texts in which a control token may be named."""
        texts = (self.start, self.system, self.user, self.assistant, self.user_with_input)
        return tuple(text for text in texts if text is not None)

    @property
    def names_ends(self) -> bool:
        """Whether it says itself where BOS and EOS are."""
        return self.start is not None or any(end in text for end in (BOS, EOS) for text in self.texts)

    @property
    def begins_with_bos(self) -> bool:
        """Whether a dialog begins with a BOS that is of no message's part, so that other tools may put it there."""
        return not self.names_ends or (self.start or "").startswith(BOS)

    @property
    def marks(self) -> dict[str, str]:
        """The text around a system prompt, before a user's message, and around an answer, by name.

        Where the template names BOS and EOS itself, also the text at the start of a dialog and after an answer's end.
        """
        before_system, _, after_system = self.system.partition("{content}")
        before_user, _, after_user = self.user.partition("{content}")
        before_answer, _, after_answer = self.assistant.partition("{content}")
        around = {
            **{"before_system": before_system, "after_system": after_system, "before_user": before_user},
            **{"before_answer": after_user + before_answer, "after_answer": after_answer},
        }
        if not self.names_ends:
            return around
        return around | {"after_answer": self.answer_end, "trailer": self.trailer, "start": self.start or ""}

    def marks_with(self, bos: str, eos: str) -> dict[str, str]:
        """Give the marks with these names for `{bos}` and `{eos}`."""
        return {name: mark.replace(BOS, bos).replace(EOS, eos) for name, mark in self.marks.items()}

    @property
    def before_answer(self) -> str:
        return self.assistant.partition("{content}")[0]

    @property
    def answer_end(self) -> str:
        """What ends an answer and is trained with it."""
        after = self.assistant.partition("{content}")[2]
        end = self._first_control_token(after)
        if not self.names_ends or end is None:
            return after + EOS
        return after[: end.end()]

    @property
    def trailer(self) -> str:
        """What follows an answer's end."""
        after = self.assistant.partition("{content}")[2]
        end = self._first_control_token(after)
        return "" if not self.names_ends or end is None else after[end.end() :]

    @property
    def end_tokens(self) -> tuple[str, ...]:
        """The control token that ends an answer, by its name; none: nothing but the EOS after it."""
        after = self.assistant.partition("{content}")[2]
        found = self._first_control_token(after)
        return (found[0],) if found and (self.names_ends or found.start() == 0) else ()

    def with_names(self, bos: str | None, eos: str, control_tokens: Sequence[str]) -> "MarkedTemplate":
        """Make the template for a tokenizer, by the names of its tokens.

        Args:
            bos, eos: where the template names them, it has `{bos}` and `{eos}`.
            control_tokens: all that the tokenizer has.
        """

        ends = {eos: str(EOS)} | ({bos: str(BOS)} if bos else {})
        # The longest first: a name may be part of a longer one.
        names = sorted({*control_tokens, *ends}, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, names)))

        def with_ends(text: str) -> str:
            return pattern.sub(lambda match: ends.get(match[0], match[0]), text)

        named = tuple(name for name in control_tokens if any(name in text for text in self.texts))
        return replace(
            self,
            user=with_ends(self.user),
            assistant=with_ends(self.assistant),
            system=with_ends(self.system),
            start=None if self.start is None else with_ends(self.start),
            user_with_input=None if self.user_with_input is None else with_ends(self.user_with_input),
            control_tokens=tuple(dict.fromkeys((*self.control_tokens, *named))),
        )

    def __call__(self, messages: Sequence[ChatMessage]) -> list[Turn]:
        system, pairs = exchanges(messages)
        if system is None:
            has_input = messages[0].instruction_and_input is not None and self.default_system_with_input is not None
            system = self.default_system_with_input if has_input else self.default_system
        turns: list[Turn] = []
        for index, (user, answer) in enumerate(pairs):
            is_with_system = index == {"last_user": len(pairs) - 1}.get(self.system_place, 0)
            prompt = (
                *self._turn_start(is_first=index == 0),
                *self._question(user, system if is_with_system else None),
                Markup(self.before_answer),
            )
            # Spaces at the seam go with the answer: the tokenizer joins a space with the word after it.
            stripped, seam = split_trailing_spaces(without_empty(prompt))
            if answer is None:
                turns.append(Turn(stripped, None))
                continue
            is_last = index == len(pairs) - 1
            turns.append(
                Turn(
                    stripped,
                    without_empty((*seam, self._stripped(answer), Markup(self.answer_end))),
                    without_empty((Markup(self.trailer),)) if is_last else (),
                )
            )
        return turns

    def _turn_start(self, *, is_first: bool) -> Text:
        if not self.names_ends:
            return (BOS,)
        return (Markup(self.start or ""),) if is_first else (Markup(self.trailer),)

    def _question(self, user: ChatMessage, system: str | None) -> Text:
        system_part = () if system is None else filled(self.system, self._stripped_text(system))
        if self.system_place != "before" and not system:
            system_part = ()
        if user.instruction_and_input is not None and self.user_with_input is not None:
            instruction, further = user.instruction_and_input
            before, _, rest = self.user_with_input.partition("{instruction}")
            between, _, after = rest.partition("{input}")
            return (*system_part, Markup(before), instruction, Markup(between), further, Markup(after))
        content = self._stripped(user)
        if self.system_place == "before":
            return (*system_part, *filled(self.user, content))
        before, _, after = self.user.partition("{content}")
        return (Markup(before), *system_part, content, Markup(after))

    def _stripped(self, message: ChatMessage) -> str:
        if self.strips == "spaces_after_answers" and message.role == "assistant":
            return message.content.rstrip(" ")
        return self._stripped_text(message.content)

    def _stripped_text(self, content: str) -> str:
        return content.strip() if self.strips == "all" else content

    def _first_control_token(self, text: str) -> re.Match[str] | None:
        names = sorted({str(BOS), str(EOS), *self.control_tokens}, key=len, reverse=True)
        return re.search("|".join(map(re.escape, names)), text)


def template_of_parts(parts: Mapping[str, str]) -> MarkedTemplate:
    """Make a template of the parts that someone wrote.

    Raises:
        ValueError: a part is unknown or missing, or does not have `{content}` exactly once; to follow the key's name.
    """
    if set(parts) - {"system", "user", "assistant", "start"} or {"user", "assistant"} - set(parts):
        raise ValueError(f": has the keys {sorted(parts)}; it needs user and assistant, and may have system and start")
    for name, part in parts.items():
        if name != "start" and part.count("{content}") != 1:
            raise ValueError(f".{name}: {part!r} has to hold {{content}} once, where the message goes")
    template = MarkedTemplate(parts["user"], parts["assistant"], start=parts.get("start"))
    return replace(template, system=parts["system"]) if "system" in parts else template
