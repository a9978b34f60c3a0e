"""Rows of data files and hub data sets, each with the place it came from."""

import codecs
import csv
import glob
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from custom_components.runtime.errors import UserError

_KEY = "dataset.source"


@dataclass(frozen=True)
class Row:
    """One record: its columns, and where it is in words a user can follow, such as `train.jsonl:17`."""

    values: dict[str, Any]
    location: str


class BadRow(UserError):
    """One record that is broken, in a source whose other records can be read."""


def _raise(bad_row: BadRow) -> None:
    raise bad_row


def read_rows(
    source: str,
    split: str = "train",
    *,
    subset: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    on_bad_row: Callable[[BadRow], None] = _raise,
    key: str = _KEY,
) -> Iterator[Row]:
    """The rows of local files, or of a data set on the hub, one by one.

    Args:
        source: a .jsonl, .json, .csv or .tsv file, these also with .gz behind, or a .parquet, .arrow or .feather file;
            a directory or a glob such as `data/*.jsonl` of them, read in the order of their names; or else a data
            set's name on the hub, `owner/name`.
        split, subset, revision: of a data set on the hub; files have none.
        streaming: fetch a data set on the hub while it is read, rather than as a whole before.
        on_bad_row: called with a record that is broken; if it returns, reading goes on behind that record.
        key: what errors call the source.

    Raises:
        UserError: no such file or data set, a kind of file that is not read, a file that is broken as a whole, by its
            line where it has any, or no row at all.
        BadRow: a single record that is broken, by its line, unless `on_bad_row` says otherwise.
    """
    files = data_files(source, key)
    num_rows = num_bad_rows = 0
    for row in _records(files) if files else _read_hub(source, split, subset, revision, streaming):
        if isinstance(row, BadRow):
            num_bad_rows += 1
            on_bad_row(row)
        else:
            num_rows += 1
            yield row
    if num_rows == 0:
        reason = f": all {num_bad_rows} records are broken" if num_bad_rows else ""
        raise UserError(f"{key}: {source!r} has no rows{reason}")


def data_files(source: str, key: str = _KEY) -> list[Path]:
    """The files a source names, in the order they are read; none if it is a data set's name on the hub.

    Args:
        key: what errors call the source.

    Raises:
        UserError: a file of a kind that is not read, a directory without data files, a glob that matches nothing, or a
            path that does not exist.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _directory_files(source, path, key)
    if path.exists():
        files = [path]
    elif any(mark in source for mark in "*?["):
        names = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob raises on 'data/**.jsonl'
        files = sorted(Path(name) for name in names if Path(name).is_file())
        if not files:
            raise UserError(f"{key}: no file matches {source!r}")
    elif _kind(path) in _READERS or source.count("/") != 1:
        raise UserError(f"{key}: there is no file {source!r}")
    else:
        return []
    for file in files:
        if _kind(file) not in _READERS:
            raise UserError(f"{key}: {str(file)!r} is no {', '.join(_READERS)} file")
    return files


# What `datasets` writes beside the data: Dataset.save_to_disk, huggingface/datasets, src/datasets/config.py.
_NOT_DATA = {"dataset_info.json", "state.json", "dataset_dict.json"}


def _directory_files(source: str, directory: Path, key: str) -> list[Path]:
    entries = sorted(entry for entry in directory.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.is_file() and _kind(entry) in _READERS and entry.name not in _NOT_DATA]
    if not files:
        names = ", ".join(entry.name for entry in entries[:8]) or "nothing"
        raise UserError(
            f"{key}: the directory {source!r} has no {', '.join(_READERS)} file, but {names}; "
            "for files further down give a glob such as 'data/**/*.jsonl'"
        )
    return files


def _kind(path: Path) -> str:
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _records(files: list[Path]) -> Iterator[Row | BadRow]:
    for file in files:
        yield from _READERS[_kind(file)](file)


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
    reader = csv.reader(_text_lines(path), delimiter="\t" if _kind(path) == ".tsv" else ",", strict=True)
    line_number = 1
    try:
        header = next(reader, [])
        if repeated := [name for name, count in Counter(header).items() if count > 1]:
            raise UserError(f"{path}:1: the header has {repeated[0]!r} more than once")
        line_number = reader.line_num + 1
        for cells in reader:
            location = f"{path}:{line_number}"
            if len(cells) == len(header):
                yield _row(dict(zip(header, cells, strict=True)), location)
            elif cells:
                start = ",".join(cells)[:60]
                yield BadRow(f"{location}: has {len(cells)} cells, the header has {len(header)}: {start!r}")
            line_number = reader.line_num + 1
    except csv.Error as error:
        # The record's first line: an open quote runs on to the end of the file.
        raise UserError(f"{path}:{line_number}: not valid CSV ({error}) from this record on") from None


def _text_lines(path: Path) -> Iterator[str]:
    """Lines with their ends, each decoded by itself so that a wrong byte is named by its line."""
    line_number = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for block in file:
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
        f"{location}: byte 0x{line[start]:02x} is not UTF-8 text, in {around!r}; save the file as UTF-8 text"
    )


def _read_columnar(path: Path) -> Iterator[Row]:
    import pyarrow

    index = 0
    kind = _kind(path).removeprefix(".")
    try:
        for batch in _parquet_batches(path) if kind == "parquet" else _arrow_batches(path):
            batch.validate(full=True)  # a broken batch makes to_pylist read outside of it
            for values in batch.to_pylist():
                index += 1
                yield Row(values, f"{path} row {index}")
    # Broken files come as any of these: as a bad length, a bad offset, or text that is not UTF-8.
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: not a whole {kind} file behind row {index} ({reason})") from None


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


def _read_hub(name: str, split: str, subset: str | None, revision: str | None, streaming: bool) -> Iterator[Row]:
    import datasets

    num_rows = 0
    try:
        for values in datasets.load_dataset(name, subset, split=split, revision=revision, streaming=streaming):
            num_rows += 1
            yield Row(values, f"{name} row {num_rows}")
    except Exception as error:  # noqa: BLE001 - the hub's client raises a dozen unrelated types
        details = {"split": split, "subset": subset, "revision": revision, "after row": num_rows or None}
        what = "".join(f", {key} {value!r}" for key, value in details.items() if value is not None)
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"dataset.source: {name!r} is no file here and could not be fetched from the hub{what}: {reason}"
        ) from None


_READERS: dict[str, Callable[[Path], Iterator[Row | BadRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_columnar,
    ".arrow": _read_columnar,
    ".feather": _read_columnar,
}


def _row(values: Any, location: str) -> Row | BadRow:
    if not isinstance(values, dict):
        return BadRow(f"{location}: holds {repr(values)[:60]} where an object with columns is due")
    return Row(values, location)
