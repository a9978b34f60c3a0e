"""The formats of rows that hold a pair of answers, a better and a worse one, by name or recognised from the columns."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from custom_components.datasets.dialog_reader import replaced_columns
from custom_components.datasets.dialog_rules import ROW_WITHOUT_ANSWER, DialogRules, trained_dialog
from custom_components.datasets.file_readers import Row
from custom_components.datasets.pair_converters import (
    alpaca_pair,
    implicit_pair,
    messages_pair,
    openai_pair,
    prompt_pair,
    sharegpt_pair,
)
from custom_components.datasets.row_columns import check_columns, judged_column, suggested_pair_map
from custom_components.datasets.row_formats import (
    UNTRAINED_ROW,
    format_by_name,
    recognised_format,
    renamed,
    spelled_as_ours,
    with_system_column,
)
from custom_components.datasets.row_messages import RowMessage, RowNotes, listed, shown
from custom_components.transforms.dialogs import ChatMessage

EQUAL_ANSWERS = "dropped (both answers are the same)"
SHARED_MARK = "mark{s} of answers that both dialogs of a pair share, not compared"

PairConverter = Callable[[dict[str, Any], RowNotes, str], list[RowMessage]]


@dataclass(frozen=True)
class PairFormat:
    """A format of pairs in columns.

    Attributes:
        columns: those every row has; the last two are those of the better and the worse answer.
        optional_columns: those a row may have.
        read: gives the whole dialog with the answer of one of these two columns; for a bad row it raises a ValueError
            that shows what is wrong.
    """

    name: str
    columns: tuple[str, ...]
    optional_columns: tuple[str, ...]
    read: PairConverter

    def convert(
        self, values: dict[str, Any], rules: DialogRules, notes: RowNotes
    ) -> tuple[list[ChatMessage], list[ChatMessage]] | None:
        """Turn a row into its two dialogs, chosen and rejected; None if rules or marks leave nothing of it.

        Only the answers in which they differ are compared: those before are marked as not trained.

        Raises:
            ValueError: the row is not such a pair, or has a column that can neither be used nor left out.
        """
        is_trained, unused = check_columns(values, {*self.columns, *self.optional_columns}, is_dialog=True)
        notes.unused_columns += unused
        if not is_trained:
            notes.counted = [UNTRAINED_ROW]
            return None
        of_each = [RowNotes(), RowNotes()]
        dialogs = []
        for column, of_dialog in zip(self.columns[-2:], of_each, strict=True):
            messages = with_system_column(self.read(values, of_dialog, column), values, of_dialog)
            dialogs.append(trained_dialog(messages, rules, of_dialog, takes_empty_questions=False))
            notes.unused_keys += of_dialog.unused_keys
        chosen, rejected = dialogs
        if not (chosen and rejected) or not (chosen[-1].content.strip() and rejected[-1].content.strip()):
            notes.counted = [ROW_WITHOUT_ANSWER]
            return None
        # What happened to the messages that both share is said once.
        notes.counted += (Counter(of_each[0].counted) | Counter(of_each[1].counted)).elements()
        num_shared = len([*takewhile(_is_same, zip(chosen, rejected, strict=False))])
        if num_shared == len(chosen) == len(rejected):
            notes.counted = [EQUAL_ANSWERS]
            return None
        self._check_split(chosen, rejected, num_shared)
        if any(message.is_supervised for message in (*chosen[:num_shared], *rejected[:num_shared])):
            notes.counted.append(SHARED_MARK)
        return _compared_from(chosen, num_shared), _compared_from(rejected, num_shared)

    def _check_split(self, chosen: list[ChatMessage], rejected: list[ChatMessage], num_shared: int) -> None:
        better, worse = self.columns[-2:]
        for dialog, name, other in ((chosen, better, worse), (rejected, worse, better)):
            if num_shared == len(dialog):
                raise ValueError(f"{other!r} goes on where {name!r} ends; a pair needs two answers to one question")
        ours, theirs = chosen[num_shared], rejected[num_shared]
        if ours.role != "assistant" or theirs.role != "assistant":
            raise ValueError(
                f"{better!r} and {worse!r} differ before an answer: {ours.role} {shown(ours.content)}, {theirs.role} "
                f"{shown(theirs.content)}; a pair needs two answers to one question"
            )


def _is_same(messages: tuple[ChatMessage, ChatMessage]) -> bool:
    one, other = messages
    return (one.role, one.content) == (other.role, other.content)


def _compared_from(dialog: list[ChatMessage], num_shared: int) -> list[ChatMessage]:
    shared = [
        replace(message, is_supervised=False) if message.role == "assistant" else message
        for message in dialog[:num_shared]
    ]
    return [*shared, *dialog[num_shared:]]


@dataclass
class PairReader:
    """Turns rows of one source into pairs of dialogs.

    Attributes:
        format_name: None: the format is that of the first row that has one.
        row_format: the format, as soon as it is known.
    """

    format_name: str | None
    column_map: Mapping[str, str]
    rules: DialogRules
    row_format: PairFormat | None = None

    @property
    def format_found(self) -> str:
        return self.row_format.name if self.row_format else ""

    def dialogs(self, row: Row) -> tuple[list[list[ChatMessage]], RowNotes]:
        """Turn a row into its two dialogs, chosen and rejected; none if nothing of it is to be trained.

        Raises:
            ValueError: the row is not a pair, or not in the format of the rows before it.
        """
        values = spelled_as_ours(renamed(row.values, self.column_map), PAIR_FORMATS)
        row_format = self.row_format
        if self.format_name is not None:
            row_format = format_by_name(self.format_name, values.keys(), PAIR_FORMATS)
        elif row_format is None:
            row_format = recognised_pair_format(values, self.column_map.keys())
        notes = RowNotes()
        pair = row_format.convert(values, self.rules, notes)
        notes.unused_columns += replaced_columns(row, self.column_map)
        self.row_format = row_format
        return [*pair] if pair else [], notes


def recognised_pair_format(row: Mapping[str, Any], mapped_columns: Collection[str] = ()) -> PairFormat:
    """Recognise the format of a row by its columns; one whose columns are null in this row only if there is no other.

    Args:
        mapped_columns: our columns that `column_map` names; a format without all of them is skipped.

    Raises:
        ValueError: no format has these columns; it says what the row is, or how to name its columns.
    """
    fitting = [
        pair_format
        for pair_format in PAIR_FORMATS.values()
        if set(pair_format.columns) <= row.keys()
        and set(mapped_columns) <= {*pair_format.columns, *pair_format.optional_columns}
    ]
    filled = [pair_format for pair_format in fitting if all(row[column] is not None for column in pair_format.columns)]
    if fitting:
        return (filled or fitting)[0]
    raise ValueError(_problem_of_other_rows(row, mapped_columns))


def _problem_of_other_rows(row: Mapping[str, Any], mapped_columns: Collection[str]) -> str:
    if (column := judged_column(row)) is not None:
        return (
            f"{column!r} holds {str(row[column])!r}, which judges one answer, as in KTO's sets; this recipe takes "
            "pairs, a better and a worse answer to one question in each row"
        )
    mapped = f", and dataset.column_map gives {listed(mapped_columns)}" if mapped_columns else ""
    try:
        found = recognised_format(row.keys(), row)
    except ValueError:
        names = ", ".join(map(repr, row)) or "none"
        return f"no format of pairs has the columns {names}{mapped}; name them: {suggested_pair_map(row)}"
    return (
        f"is {found.name}, without a worse answer{mapped}; this recipe takes pairs, in columns such as prompt, chosen "
        "and rejected; recipes/lora_single_device.py trains on dialogs"
    )


_SYSTEM = ("system",)
_PAIR = ("chosen", "rejected")
# In the order they are tried: rows with a `prompt` often have the better dialog as `messages` too.
PAIR_FORMATS = {
    pair_format.name: pair_format
    for pair_format in (
        PairFormat("prompt_chosen_rejected", ("prompt", *_PAIR), _SYSTEM, prompt_pair),
        PairFormat("sharegpt_chosen_rejected", ("conversations", *_PAIR), _SYSTEM, sharegpt_pair),
        PairFormat("messages_chosen_rejected", ("messages", *_PAIR), _SYSTEM, messages_pair),
        PairFormat("alpaca_chosen_rejected", ("instruction", *_PAIR), ("input", "history", *_SYSTEM), alpaca_pair),
        PairFormat("chosen_rejected", _PAIR, _SYSTEM, implicit_pair),
        PairFormat("openai_preference", ("input", "preferred_output", "non_preferred_output"), (), openai_pair),
    )
}
