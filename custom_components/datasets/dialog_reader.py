"""The rows of a source to dialogs, in the format of the first row that has one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from custom_components.datasets.dialog_rules import DialogRules
from custom_components.datasets.file_readers import Row
from custom_components.datasets.row_formats import (
    FORMATS,
    RowFormat,
    format_by_name,
    recognised_format,
    renamed,
    spelled_as_ours,
)
from custom_components.datasets.row_messages import RowNotes
from custom_components.transforms.dialogs import ChatMessage
from custom_components.transforms.training_marks import is_blank


@dataclass
class DialogReader:
    """Turns rows of one source into dialogs.

    Attributes:
        format_name: None: the format is that of the first row that has one.
        row_format: the format, as soon as it is known.
    """

    format_name: str | None
    column_map: Mapping[str, str]
    rules: DialogRules
    row_format: RowFormat | None = None
    _first_location: str = ""

    @property
    def format_found(self) -> str:
        return self.row_format.name if self.row_format else ""

    def dialogs(self, row: Row) -> tuple[Sequence[list[ChatMessage]], RowNotes]:
        """Turn a row into its dialog, none if nothing of it is to be trained, and what there is to say of it.

        Raises:
            ValueError: the row is not a dialog, or not in the format of the rows before it.
        """
        values = spelled_as_ours(renamed(row.values, self.column_map), FORMATS)
        row_format = self._format_of(values)
        notes = RowNotes()
        dialog = row_format.convert(values, self.rules, notes)
        notes.unused_columns += replaced_columns(row, self.column_map)
        if self.row_format is None:
            self.row_format, self._first_location = row_format, row.location
        return [dialog] if dialog else [], notes

    def _format_of(self, values: Mapping[str, object]) -> RowFormat:
        if self.format_name is not None:
            return format_by_name(self.format_name, values.keys(), FORMATS)
        if self.row_format is None:
            return recognised_format(values.keys(), values, self.column_map.keys())
        if self.row_format.is_text and "text" in values:
            found = recognised_format(values.keys(), values, ["text", *self.column_map])
            if found is not self.row_format:
                raise ValueError(
                    f"is {found.name}, where the set is {self.row_format.name} by its first row, "
                    f"{self._first_location}; name the format with dataset.format, or move such rows to another file"
                )
        return self.row_format


def replaced_columns(row: Row, column_map: Mapping[str, str]) -> list[str]:
    """Name the columns of a row that are filled and not used, because `column_map` has others take their place."""
    return [column for column in column_map.keys() - column_map.values() if not is_blank(row.values.get(column))]
