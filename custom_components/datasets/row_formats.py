"""The formats of rows that hold a dialog, by name or recognised from the columns."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from custom_components.datasets.row_converters import (
    RowConverter,
    alpaca_row,
    is_llama2_text,
    is_marked_text,
    listed,
    llama2_text_row,
    marked_text_row,
    messages_row,
    prompt_completion_row,
    sharegpt_row,
    shown,
    text_row,
    with_system,
)


@dataclass(frozen=True)
class RowFormat:
    """A format of dialogs in columns.

    Attributes:
        columns: those every row has.
        optional_columns: those a row may have; all others are ignored.
        convert: turns a row into messages; for a bad row it raises a ValueError that shows what is wrong.
    """

    name: str
    columns: tuple[str, ...]
    optional_columns: tuple[str, ...]
    convert: RowConverter


def recognised_format(
    columns: Collection[str], first_row: Mapping[str, Any], mapped_columns: Collection[str] = ()
) -> RowFormat:
    """Recognise the format of rows by their columns, and of rows with a `text` column by the first row's text.

    Args:
        mapped_columns: our columns that `column_map` names; a format without all of them is skipped.

    Raises:
        ValueError: no format has these columns, or the first row's `text` is empty or not text.
    """
    for row_format in FORMATS.values():
        known = {*row_format.columns, *row_format.optional_columns}
        if set(row_format.columns) <= set(columns) and set(mapped_columns) <= known:
            if row_format.columns == ("text",):
                return FORMATS[_text_format_name(first_row["text"])]
            return row_format
    known_columns = "; ".join(f"{name}: {', '.join(row_format.columns)}" for name, row_format in FORMATS.items())
    mapped = f", and dataset.column_map gives {listed(mapped_columns)}" if mapped_columns else ""
    raise ValueError(
        f"no format has the columns {listed(columns)}{mapped}; known are {known_columns}. Name yours with "
        "dataset.column_map, such as {prompt: question, completion: answer}"
    )


def format_by_name(name: str, columns: Collection[str]) -> RowFormat:
    """Look up a format by its name.

    Raises:
        ValueError: there is no such format, or the rows do not have its columns.
    """
    if name not in FORMATS:
        nearest = get_close_matches(name, FORMATS, n=1, cutoff=0)[0]
        raise ValueError(f"dataset.format: {name!r} is none of {', '.join(FORMATS)}; nearest is {nearest!r}")
    missing = [column for column in FORMATS[name].columns if column not in columns]
    if missing:
        raise ValueError(
            f"dataset.format: {name!r} needs the column {missing[0]!r}, the rows have {listed(columns)}; "
            f"name yours with dataset.column_map, such as {{{missing[0]}: {next(iter(columns), 'question')}}}"
        )
    return FORMATS[name]


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


def _text_format_name(text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"'text' holds {shown(text)}, by which no format can be told; name one with dataset.format")
    if is_llama2_text(text):
        return "llama2_text"
    return "marked_text" if is_marked_text(text) else "text"


_SYSTEM = ("system",)
# In the order they are tried: rows with `messages` often have the same as `prompt` or `text` too.
FORMATS = {
    row_format.name: row_format
    for row_format in (
        RowFormat("messages", ("messages",), _SYSTEM, with_system(messages_row)),
        RowFormat("sharegpt", ("conversations",), _SYSTEM, with_system(sharegpt_row)),
        RowFormat("alpaca", ("instruction", "output"), ("input", "history", *_SYSTEM), with_system(alpaca_row)),
        RowFormat("prompt_completion", ("prompt", "completion"), _SYSTEM, with_system(prompt_completion_row)),
        RowFormat("llama2_text", ("text",), _SYSTEM, with_system(llama2_text_row)),
        RowFormat("marked_text", ("text",), _SYSTEM, with_system(marked_text_row)),
        RowFormat("text", ("text",), (), with_system(text_row)),
    )
}
