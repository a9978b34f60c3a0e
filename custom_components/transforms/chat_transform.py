"""From messages to token ids and which of them are supervised, as the model's own format has them."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypedDict, Unpack

from custom_components.runtime.errors import UserError
from custom_components.transforms.dialogs import (
    ChatMessage,
    chat_messages,
    check_marks,
    check_torchtune_masks,
    with_system_message,
)
from custom_components.transforms.jinja_dialogs import JinjaTemplate
from custom_components.transforms.marked_template import MarkedTemplate
from custom_components.transforms.new_tokens import (
    check_that_rows_have_tokens,
    new_tokens_note,
    with_tokens,
    with_tokens_beside,
)
from custom_components.transforms.template_choice import chosen_template, names_in, stop_tokens
from custom_components.transforms.templates import PromptTemplate, dialog_turns
from custom_components.transforms.tokenizer import Tokenizer
from custom_components.transforms.tokenizer_reading import read_tokenizer
from custom_components.transforms.turn_encoding import EncodedDialog, encode_turns, splits_a_token
from custom_components.transforms.turns import Turn

TrainOn = Literal["assistant", "last_assistant", "all"]


class _Changes(TypedDict, total=False):
    """The attributes that :meth:`ChatTransform.replace` can change."""

    max_seq_len: int | None
    system_prompt: str | None
    train_on: TrainOn
    stop_tokens: tuple[int, ...]
    tokenizer: Tokenizer
    format_note: str


@dataclass(frozen=True, init=False, eq=False, repr=False)
class ChatTransform:
    """A checkpoint's tokenizer and a chat format, as a torchtune model transform.

    It is frozen, so the tokens it gives never change. :meth:`replace` makes another.

    Args:
        path: the checkpoint's directory, or its tokenizer.model or tokenizer.json.
        max_seq_len: rows are cut to this many tokens; None: never. A row that is cut gets no end token.
        system_prompt: for dialogs that have none of their own; None: no system prompt, or the template's own.
        prompt_template: a name or parts, see :func:`chosen_template`.
        train_on: "assistant": every answer; "last_assistant": the last answer of a dialog; "all": the prompts as well.
            An answer that its row marks as not trained, with `weight: 0` say, is never trained on.
        trainable_tokens: tokens whose rows in the model are to be trained; those that the tokenizer lacks are added.
        adapter_dir: of an adapter that may have tokens of its own, in the tokenizer's files beside it.

    Attributes:
        trainable_ids: of `trainable_tokens`.
        stop_tokens: the ids that end an answer.
        tokenizer: encodes and decodes text. Control tokens are recognized where the template itself names them; in a
            message, their text stays text.
        format_note: how the template relates to the checkpoint's own, to be said once; "": there is nothing to say.

    Raises:
        UserError: there is no such tokenizer, or it does not have the control tokens of the template.
    """

    max_seq_len: int | None
    system_prompt: str | None
    prompt_template: str | dict[str, str]
    train_on: TrainOn
    stop_tokens: tuple[int, ...]
    pad_id: ClassVar[int] = 0  # nothing here pads; torchtune's collators need it
    tokenizer: Tokenizer
    format_note: str
    trainable_ids: tuple[int, ...]
    _template: PromptTemplate

    def __init__(
        self,
        path: str | Path,
        max_seq_len: int | None = None,
        system_prompt: str | None = None,
        prompt_template: str | dict[str, str] = "auto",
        train_on: TrainOn = "assistant",
        trainable_tokens: Sequence[str] | None = None,
        adapter_dir: Path | None = None,
    ) -> None:
        of_checkpoint = read_tokenizer(path)
        tokenizer = with_tokens(of_checkpoint, trainable_tokens or ())
        if adapter_dir is not None:
            tokenizer = with_tokens_beside(tokenizer, adapter_dir)
        choice = chosen_template(prompt_template, tokenizer)
        check_that_rows_have_tokens(trainable_tokens or (), choice.template, tokenizer)
        vars(self).update(  # note: a frozen dataclass cannot set its fields one by one
            max_seq_len=max_seq_len,
            system_prompt=choice.system_prompt if system_prompt is None else system_prompt,
            prompt_template=choice.description,
            train_on=train_on,
            tokenizer=tokenizer.with_control_tokens(names_in(choice.template)),
            stop_tokens=stop_tokens(choice.template, tokenizer),
            format_note="\n".join(filter(None, (choice.note, new_tokens_note(of_checkpoint, tokenizer)))),
            trainable_ids=tuple(tokenizer.ids_of_pieces(trainable_tokens or ())),
            _template=choice.template,
        )

    def replace(self, **changes: Unpack[_Changes]) -> Self:
        """Make a transform that differs in these and shares the loaded tokenizer."""
        assert changes.keys() <= _Changes.__annotations__.keys(), changes
        changed = copy.copy(self)
        vars(changed).update(changes)
        return changed

    def with_system_prompt(self, system_prompt: str | None) -> Self:
        """Make a transform with this system prompt; None: keep the one there is.

        A dialog's system prompt is the first of these that is given, and an empty text is given:

        1. the dialog's own system message: a row's first message or `system` column, a chat's `/system`;
        2. `system_prompt` of the `dataset` or `dataset_val` that the row is from;
        3. `system_prompt` of generate or evaluate, in their config or on the command line;
        4. `tokenizer.system_prompt` in training; for an adapter or a merge the one in its prompt_format.yaml, which
           is what its run trained with: `dataset.system_prompt`, else `tokenizer.system_prompt`;
        5. the template's own, if it has one, as Alpaca's.
        """
        return self if system_prompt is None else self.replace(system_prompt=system_prompt)

    @property
    def bos_id(self) -> int | None:
        return self.tokenizer.bos_id

    @property
    def eos_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.num_pieces

    @property
    def begins_with_bos(self) -> bool:
        """Whether the template puts BOS at the start of a dialog."""
        template = self._template
        return not isinstance(template, MarkedTemplate | JinjaTemplate) or template.begins_with_bos

    @property
    def stop_pieces(self) -> list[str]:
        """The names of the stop tokens, such as `</s>`."""
        return [piece for token in self.stop_tokens if (piece := self.tokenizer.piece(token)) is not None]

    @property
    def template_tokens(self) -> tuple[str, ...]:
        """The names of control tokens in the template's own text; for a Jinja template, all that there may be."""
        is_jinja = isinstance(self._template, JinjaTemplate)
        return tuple(self.tokenizer.control_ids) if is_jinja else names_in(self._template)

    @property
    def fingerprint(self) -> list[Any]:
        """All that determines the tokens of a row, as JSON values: the tokenizer's content and the settings."""
        settings = [self.max_seq_len, self.system_prompt, self.prompt_template, self.train_on]
        ids = self.tokenizer.control_ids
        marks = [[mark, ids[mark]] for mark in self.template_tokens if mark in ids]
        return [self.tokenizer.digest, *settings, *([marks] if marks else [])]

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> dict[str, Any]:
        """Tokenize one row, as torchtune's transform protocol has it.

        Args:
            sample: `{"messages": [...]}`, dicts with role and content or torchtune Messages.
            inference: leave the last turn open, for the model to answer. An answer that is started already is left
                open too, for the model to continue. An empty assistant message at the end, as torchtune's generate
                recipe adds it, means the same as none.

        Returns:
            the sample without its messages, and `tokens`, a list of ids, and `mask`, True where not trained on.

        Raises:
            ValueError: for messages that are not a dialog, and for marks, or a torchtune Message's `masked`, that
                contradict `train_on`.
        """
        messages = list(sample["messages"])
        if inference and messages and _is_empty_answer(messages[-1]):
            messages.pop()
        dialog = chat_messages(messages)
        if not inference:
            check_torchtune_masks(messages, trains_prompts=self.train_on == "all")
        turns = self.render(dialog)
        if inference and dialog[-1].role == "assistant":
            turns[-1] = turns[-1].opened()
        [encoded] = self.encode_turns([turns])
        rest = {key: value for key, value in sample.items() if key != "messages"}
        # torchtune's mask has the opposite polarity of everything here.
        mask = [not is_supervised for is_supervised in encoded.is_supervised]
        return {**rest, "tokens": encoded.tokens[: self.max_seq_len], "mask": mask[: self.max_seq_len]}

    def tokenize_messages(
        self, messages: Sequence[Any], *, add_start_tokens: bool = True, add_end_tokens: bool = True
    ) -> tuple[list[int], list[bool]]:
        """Give the tokens and mask of `__call__`, as torchtune's tokenizer protocol has it.

        Args:
            add_start_tokens: False: without the BOS of the first turn.
            add_end_tokens: False: without the EOS of the last, as `inference`.
        """
        row = self({"messages": messages}, inference=not add_end_tokens)
        start = 0 if add_start_tokens or row["tokens"][:1] != [self.bos_id] else 1
        return row["tokens"][start:], row["mask"][start:]

    def render(self, dialog: Sequence[ChatMessage]) -> list[Turn]:
        """Write a dialog in the template, with the transform's system prompt if it has none of its own.

        Raises:
            ValueError: for a message that contains one of Llama 2's tags in its format, or is marked to be trained or
                not against `train_on`.
        """
        if dialog[-1].role == "assistant":  # an open dialog is a prompt to answer: nothing of it is trained
            check_marks(dialog, trains_prompts=self.train_on == "all")
        turns = dialog_turns(with_system_message(dialog, self.system_prompt), self._template)
        if self.train_on == "last_assistant":
            turns[:-1] = [replace(turn, is_supervised=False) for turn in turns[:-1]]
        return turns

    def encode_turns(self, rendered_dialogs: Sequence[Sequence[Turn]]) -> list[EncodedDialog]:
        """Tokenize many rendered dialogs at once, which is faster than one by one; rows are not cut."""
        return encode_turns(self.tokenizer, rendered_dialogs, trains_prompts=self.train_on == "all")

    def splits_a_token(self, turns: Sequence[Turn]) -> bool:
        """See :func:`splits_a_token`."""
        return splits_a_token(self.tokenizer, turns)

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Encode plain text, as torchtune's tokenizer protocol has it."""
        bos = [self.bos_id] if add_bos and self.bos_id is not None else []
        return bos + self.tokenizer.encode([text])[0] + [self.eos_id] * add_eos

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode ids to text, without control tokens and ids beyond the tokenizer, of a padded vocabulary."""
        return self.tokenizer.decode(token_ids)

    def ids_of_pieces(self, pieces: Sequence[str]) -> list[int]:
        """Look up control tokens and other pieces by name, see :meth:`Tokenizer.ids_of_pieces`."""
        return self.tokenizer.ids_of_pieces(pieces)

    def text_of_pieces(self, token_ids: Sequence[int]) -> str:
        """Show ids as text, see :meth:`Tokenizer.text_of_pieces`."""
        return self.tokenizer.text_of_pieces(token_ids)


def _is_empty_answer(message: Any) -> bool:
    role, content = (
        (message.get("role"), message.get("content"))
        if isinstance(message, Mapping)
        else (message.role, message.text_content)
    )
    return role == "assistant" and not content


def prompt_tokens(
    tokenizer: ChatTransform, dialog: Sequence[Mapping[str, str] | ChatMessage], max_seq_len: int
) -> list[int]:
    """Tokenize a dialog that ends with the user's message, its last turn left open.

    Raises:
        UserError: it leaves no room for an answer in the context.
        ValueError: it is not a dialog, or a message contains one of the template's own marks.
    """
    # Not by the transform's call, which cuts at `tokenizer.max_seq_len`: that is for training rows.
    [(tokens, _)] = tokenizer.encode_turns([tokenizer.render(chat_messages(dialog))])
    if len(tokens) >= max_seq_len:
        raise UserError(f"prompt: {len(tokens)} tokens leave no room for an answer in a context of {max_seq_len}")
    return tokens
