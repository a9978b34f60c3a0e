"""Rows of data files, each with its place: one reader for each kind of file."""

import codecs
import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from custom_components.runtime.errors import UserError

# Of .csv files; where two give as many columns, the first.
_DELIMITERS = (",", ";", "\t")
_DELIMITER_HINT = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)  # the first line of some, for Excel
_MOST_LINE_BYTES = 2**28
# Lines of a larger file are not counted: that takes as long as reading it.
_MOST_BYTES_COUNTED = 2**26


@dataclass(frozen=True)
class Row:
    """One record: its columns, and where it is in words a user can follow, such as `train.jsonl:17`."""

    values: dict[str, Any]
    location: str


class BadRow(UserError):
    """One record that is broken, in a source whose other records can be read."""


def file_kind(path: Path) -> str:
    """Give the suffix that says how a file is read, in small letters and without `.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_file(path: Path) -> Iterator[Row | BadRow]:
    """Read a file of one of :data:`FILE_KINDS`, one record after the other.

    Raises:
        UserError: the file is broken as a whole, named by its line if it has any.
    """
    return _READERS[file_kind(path)](path)


def num_rows_of_file(path: Path) -> int | None:
    """Count a file's rows without reading them as rows; None: that would take long, or the file is damaged."""
    try:
        if file_kind(path) == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_metadata(path).num_rows
        if path.suffix.lower() == ".jsonl" and path.stat().st_size <= _MOST_BYTES_COUNTED:
            with path.open("rb") as file:
                return sum(not line.isspace() for line in file)
    except (OSError, ValueError):  # pyarrow's errors are one of these
        return None
    return None


def _read_jsonl(path: Path) -> Iterator[Row | BadRow]:
    for line_number, line in enumerate(_text_lines(path), 1):
        if line.strip():
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield BadRow(f"{path}:{line_number}: not a JSON object ({_json_problem(error, line)})")
            else:
                yield _row(values, f"{path}:{line_number}")


def _read_json(path: Path) -> Iterator[Row | BadRow]:
    text = "".join(_text_lines(path))
    if not text.strip():
        return
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data" and text.lstrip().startswith("{"):
            yield from _read_jsonl(path)  # one object a line, under the wrong suffix
            return
        line_number = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}{line_number}: not valid JSON ({_json_problem(error, text)})") from None
    if not isinstance(records, list):
        raise UserError(f"{path}: holds {type(records).__name__}; a JSON data file is a list of objects")
    for index, values in enumerate(records):
        yield _row(values, f"{path} row {index + 1}")


def _json_problem(error: Exception, text: str) -> str:
    if isinstance(error, json.JSONDecodeError):
        around = text[max(0, error.pos - 30) : error.pos + 30].strip()
        return f"{error.msg} at column {error.colno}, in {around!r}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _read_csv(path: Path) -> Iterator[Row | BadRow]:
    # note: cells hold whole documents; csv's own limit is 128 KiB.
    csv.field_size_limit(2**30)
    lines = _text_lines(path)
    first_line, num_lines_before = next(lines, ""), 0
    if hint := _DELIMITER_HINT.fullmatch(first_line):
        first_line, num_lines_before = next(lines, ""), 1
        delimiter = hint[1]
    else:
        delimiter = "\t" if file_kind(path) == ".tsv" else _delimiter(first_line)
    reader = csv.reader(chain([first_line], lines), delimiter=delimiter, strict=True)
    line_number = 1 + num_lines_before
    try:
        header = [name if name.strip() else f"column {number}" for number, name in enumerate(next(reader, []), 1)]
        if repeated := [name for name, count in Counter(header).items() if count > 1]:
            raise UserError(f"{path}:{line_number}: the header has {repeated[0]!r} more than once")
        line_number = num_lines_before + reader.line_num + 1
        for cells in reader:
            location = f"{path}:{line_number}"
            is_blank = not any(cell.strip() for cell in cells)  # spreadsheets end with lines of separators
            if len(cells) == len(header) and not is_blank:
                yield _row(dict(zip(header, cells, strict=True)), location)
            elif not is_blank:
                start = delimiter.join(cells)[:60]
                yield BadRow(f"{location}: has {len(cells)} cells, the header has {len(header)}: {start!r}")
            line_number = num_lines_before + reader.line_num + 1
    except csv.Error as error:
        # The record's first line: an open quote runs on to the end of the file.
        raise UserError(f"{path}:{line_number}: not valid CSV ({error}) from this record on") from None


def _delimiter(header_line: str) -> str:
    """Tell what separates the columns: a comma, or what spreadsheets write where the comma is in numbers."""
    return max(_DELIMITERS, key=lambda delimiter: len(next(csv.reader([header_line], delimiter=delimiter), [])))


def _text_lines(path: Path) -> Iterator[str]:
    """Lines with their ends, each decoded by itself so that a wrong byte is named by its line."""
    line_number = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            while block := file.readline(_MOST_LINE_BYTES):
                if len(block) == _MOST_LINE_BYTES:
                    raise UserError(
                        f"{path}:{line_number + 1}: is longer than {_MOST_LINE_BYTES // 2**20} MiB; no row is, and a "
                        "compressed file of zeros would fill the memory"
                    )
                if line_number == 0:
                    block = block.removeprefix(codecs.BOM_UTF8)
                for line in block.splitlines(keepends=True):
                    line_number += 1
                    yield _decoded(line, f"{path}:{line_number}")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}:{line_number + 1}: cannot be read from here on ({error})") from None


def _decoded(line: bytes, location: str) -> str:
    # Zero bytes are UTF-8, but no text has them: parquet, pickle, UTF-16.
    start = line.find(b"\0")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        start = error.start if start < 0 else start
    if start < 0:
        return text
    around = line[max(0, start - 30) : start + 30]
    raise UserError(
        f"{location}: byte 0x{line[start]:02x} is not UTF-8 text, in {around!r}; save the file as UTF-8 text "
        "(a spreadsheet: as 'CSV UTF-8')"
    )


def _read_columnar(path: Path) -> Iterator[Row]:
    import pyarrow

    index = 0
    kind = file_kind(path).removeprefix(".")
    try:
        for batch in _parquet_batches(path) if kind == "parquet" else _arrow_batches(path):
            batch.validate(full=True)  # a broken batch makes to_pylist read outside of it
            for values in batch.to_pylist():
                index += 1
                yield Row(values, f"{path} row {index}")
    # Broken files come as any of these: as a bad length, a bad offset, or text that is not UTF-8.
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: not a whole {kind} file after row {index} ({reason})") from None


def _parquet_batches(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=1024)


# Apache Arrow columnar format, "IPC File Format": a file begins with this, a stream (as `datasets` writes) does not.
_ARROW_FILE_MAGIC = b"ARROW1"


def _arrow_batches(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.ipc

    with pyarrow.OSFile(str(path)) as file:
        is_file_format = file.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
        file.seek(0)
        if is_file_format:
            reader = pyarrow.ipc.open_file(file)
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)
        else:
            yield from pyarrow.ipc.open_stream(file)


_READERS: dict[str, Callable[[Path], Iterator[Row | BadRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_columnar,
    ".arrow": _read_columnar,
    ".feather": _read_columnar,
}
FILE_KINDS = tuple(_READERS)


def _row(values: Any, location: str) -> Row | BadRow:
    if not isinstance(values, dict):
        return BadRow(f"{location}: holds {repr(values)[:60]} where an object with columns is due")
    return Row(values, location)
