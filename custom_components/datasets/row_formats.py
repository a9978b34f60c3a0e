"""The formats of rows that hold a dialog, by name or recognised from the columns."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from typing import Any, Protocol, TypeVar

from custom_components.datasets.dialog_rules import DialogRules, dialog_in_turns, named, trained_dialog
from custom_components.datasets.row_columns import check_columns, neglected_pair, pair_problem, suggested_column_map
from custom_components.datasets.row_converters import (
    RowConverter,
    alpaca_row,
    messages_row,
    optional_text,
    prompt_completion_row,
    sharegpt_row,
)
from custom_components.datasets.row_messages import RowMessage, RowNotes, listed
from custom_components.datasets.text_rows import (
    foreign_marks,
    llama2_text_row,
    marked_text_row,
    text_format,
    text_row,
)
from custom_components.runtime.errors import UserError
from custom_components.transforms.dialogs import ChatMessage

_MOST_COLUMNS_NAMED = 8
UNTRAINED_ROW = "dropped (marked as not trained)"
OTHER_SYSTEM = "with a 'system' column that is not used, because the dialog has a system message"


class HasColumns(Protocol):
    """What formats of dialogs and of pairs have in common: the columns of every row, and those a row may have."""

    @property
    def columns(self) -> tuple[str, ...]: ...

    @property
    def optional_columns(self) -> tuple[str, ...]: ...


Formats = Mapping[str, HasColumns]
AnyFormat = TypeVar("AnyFormat", bound=HasColumns)


@dataclass(frozen=True)
class RowFormat:
    """A format of dialogs in columns.

    Attributes:
        columns: those every row has.
        optional_columns: those a row may have.
        read: turns a row into the messages that it spells; for a bad row it raises a ValueError that shows what is
            wrong.
        takes_empty_questions: published sets of this format have them.
    """

    name: str
    columns: tuple[str, ...]
    optional_columns: tuple[str, ...]
    read: RowConverter
    takes_empty_questions: bool = False

    @property
    def is_text(self) -> bool:
        return self.columns == ("text",)

    def convert(
        self, values: dict[str, Any], rules: DialogRules | None = None, notes: RowNotes | None = None
    ) -> list[ChatMessage]:
        """Turn a row into the dialog to train on; empty if rules or marks leave nothing of it.

        Raises:
            ValueError: the row is not such a dialog, or has a column that can neither be used nor left out.
        """
        notes = RowNotes() if notes is None else notes
        known = {*self.columns, *self.optional_columns}
        is_trained, unused = check_columns(values, known, is_dialog=self.name != "text")
        messages = self._messages(values, notes)
        notes.unused_columns += unused
        if not is_trained:
            if any(message.is_supervised for message in messages):
                raise ValueError("is marked as not trained, and one of its messages as trained")
            notes.counted = [UNTRAINED_ROW]
            return []
        if self.name == "text":
            notes.foreign_marks += foreign_marks(messages[0].content)
            return [ChatMessage(messages[0].role, messages[0].content)]
        rules = DialogRules() if rules is None else rules
        return trained_dialog(messages, rules, notes, takes_empty_questions=self.takes_empty_questions)

    def asked(self, values: dict[str, Any]) -> list[ChatMessage]:
        """Give a row's dialog up to the question to answer, as it would be trained.

        Raises:
            ValueError: the row is not such a dialog, or has no question.
        """
        if self.name == "text":
            raise ValueError("is plain text without a question")
        messages = dialog_in_turns(self._messages(values, RowNotes()), DialogRules(), RowNotes())
        if messages[-1].role == "assistant":
            messages = messages[:-1]
        if empty := [message for message in messages if message.role == "user" and not message.content.strip()]:
            raise ValueError(f"{named(empty[0])} is empty")
        return [ChatMessage(message.role, message.content, None, message.instruction_and_input) for message in messages]

    def _messages(self, values: dict[str, Any], notes: RowNotes) -> list[RowMessage]:
        messages = self.read(values, notes)
        return with_system_column(messages, values, notes) if "system" in self.optional_columns else messages


def with_system_column(messages: list[RowMessage], values: dict[str, Any], notes: RowNotes) -> list[RowMessage]:
    """Put a row's `system` column in front of its messages, if they have no system message of their own.

    Raises:
        ValueError: the column holds something other than text.
    """
    system = optional_text(values, "system")
    if system.strip() and messages:
        if messages[0].role != "system" or not messages[0].content.strip():
            return [RowMessage("system", system, "'system'"), *messages[messages[0].role == "system" :]]
        if messages[0].content.strip() != system.strip():
            notes.counted.append(OTHER_SYSTEM)
    return messages


def recognised_format(
    columns: Collection[str], row: Mapping[str, Any], mapped_columns: Collection[str] = ()
) -> RowFormat:
    """Recognise the format of a row by its columns, and of one with a `text` column by the text.

    A format whose columns are null in this row is taken only if there is no other.

    Args:
        mapped_columns: our columns that `column_map` names; a format without all of them is skipped.

    Raises:
        ValueError: no format has these columns, or the `text` is empty, not text, or not all there is to train on.
    """
    fitting = [
        row_format
        for row_format in FORMATS.values()
        if set(row_format.columns) <= set(columns)
        and set(mapped_columns) <= {*row_format.columns, *row_format.optional_columns}
    ]
    filled = [row_format for row_format in fitting if all(row[column] is not None for column in row_format.columns)]
    if fitting:
        row_format = (filled or fitting)[0]
        if not row_format.is_text:
            return row_format
        name = text_format(row["text"])
        if "text" not in mapped_columns and (problem := neglected_pair(row)):
            raise ValueError(problem)
        return FORMATS[name]
    if problem := pair_problem(columns):
        raise ValueError(problem)
    mapped = f", and dataset.column_map gives {listed(mapped_columns)}" if mapped_columns else ""
    names = ", ".join(map(repr, islice(columns, _MOST_COLUMNS_NAMED))) or "none"
    more = f" and {len(columns) - _MOST_COLUMNS_NAMED} more" if len(columns) > _MOST_COLUMNS_NAMED else ""
    raise ValueError(f"no format has the columns {names}{more}{mapped}; name them: {suggested_column_map(row)}")


def check_format_name(name: str, formats: Formats) -> None:
    """Check that one of some formats has this name.

    Raises:
        UserError: none has.
    """
    if name not in formats:
        nearest = get_close_matches(name, formats, n=1, cutoff=0)[0]
        raise UserError(f"dataset.format: {name!r} is none of {', '.join(formats)}; nearest is {nearest!r}")


def format_by_name(name: str, columns: Collection[str], formats: Mapping[str, AnyFormat]) -> AnyFormat:
    """Look up the format of a row by its name.

    Raises:
        ValueError: there is no such format, or the row does not have its columns.
    """
    check_format_name(name, formats)
    missing = [column for column in formats[name].columns if column not in columns]
    if missing:
        raise ValueError(
            f"dataset.format: {name!r} needs the column {missing[0]!r}, the rows have {listed(columns)}; "
            f"name yours with dataset.column_map, such as {{{missing[0]}: {next(iter(columns), 'question')}}}"
        )
    return formats[name]


def renamed(values: Mapping[str, Any], column_map: Mapping[str, str]) -> dict[str, Any]:
    """Rename a row's columns to ours.

    Args:
        column_map: the file's name for each of our columns that it names differently.

    Raises:
        ValueError: the row has no such column.
    """
    for ours, theirs in column_map.items():
        if theirs not in values:
            raise ValueError(f"dataset.column_map.{ours}: there is no column {theirs!r}, but {listed(values)}")
    replaced = {*column_map, *column_map.values()}
    kept = {column: value for column, value in values.items() if column not in replaced}
    return kept | {ours: values[theirs] for ours, theirs in column_map.items()}


def spelled_as_ours(values: Mapping[str, Any], formats: Formats) -> dict[str, Any]:
    """Rename columns that only their capitals, or spaces around them, tell from ours: `Instruction`, ` Output`.

    A row that has all columns of a format as they are is left alone.
    """
    if any(values.keys() >= {*row_format.columns} for row_format in formats.values()):
        return dict(values)
    ours = {column for row_format in formats.values() for column in (*row_format.columns, *row_format.optional_columns)}
    renamed_values: dict[str, Any] = {}
    for column, value in values.items():
        name = column.strip().lower() if isinstance(column, str) else column
        renamed_values[name if name in ours and name not in values else column] = value
    # note: two columns may differ in their capitals only; then none is renamed, and both are named in the error.
    return renamed_values if len(renamed_values) == len(values) else dict(values)


_SYSTEM = ("system",)
# In the order they are tried: rows with `messages` often have the same as `prompt` or `text` too.
FORMATS = {
    row_format.name: row_format
    for row_format in (
        RowFormat("messages", ("messages",), _SYSTEM, messages_row),
        RowFormat("sharegpt", ("conversations",), _SYSTEM, sharegpt_row),
        RowFormat("alpaca", ("instruction", "output"), ("input", "history", *_SYSTEM), alpaca_row),
        RowFormat("prompt_completion", ("prompt", "completion"), _SYSTEM, prompt_completion_row),
        RowFormat("llama2_text", ("text",), _SYSTEM, llama2_text_row, takes_empty_questions=True),
        RowFormat("marked_text", ("text",), _SYSTEM, marked_text_row),
        RowFormat("text", ("text",), (), text_row),
    )
}
