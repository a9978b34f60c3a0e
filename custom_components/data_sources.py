"""Rows of data files and hub data sets, each with the place it came from."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from custom_components.errors import UserError


@dataclass(frozen=True)
class Row:
    """One record: its columns, and where it is in words a user can follow, such as `train.jsonl:17`."""

    values: dict[str, Any]
    location: str


def read_rows(source: str, split: str = "train") -> Iterator[Row]:
    """The rows of a local file, or of a data set on the hub.

    Args:
        source: a .jsonl, .json, .csv, .tsv or .parquet file; or else a data set's name on the hub, `owner/name`.
        split: of a data set on the hub; a file has one.

    Raises:
        UserError: no such file or data set, a kind of file that is not read, or a record that is broken, by its line.
    """
    path = Path(source).expanduser()
    if path.is_file():
        reader = _READERS.get(path.suffix)
        if reader is None:
            raise UserError(f"dataset.source: {source!r} is no {', '.join(_READERS)} file")
        try:
            yield from reader(path)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from None
        return
    if path.exists():
        raise UserError(f"dataset.source: {source!r} is a directory; name a file in it")
    if path.suffix in _READERS or source.count("/") != 1:
        raise UserError(f"dataset.source: there is no file {source!r}")
    yield from _read_hub(source, split)


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for line_number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    values = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}:{line_number}: not a JSON object ({error}): {line[:60].strip()!r}") from None
                yield _row(values, f"{path}:{line_number}")


def _read_json(path: Path) -> Iterator[Row]:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line, under the wrong suffix
            yield from _read_jsonl(path)
            return
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(records, list):
        raise UserError(f"{path}: holds {type(records).__name__}; a JSON data file is a list of objects")
    for index, values in enumerate(records):
        yield _row(values, f"{path} row {index + 1}")


def _read_csv(path: Path) -> Iterator[Row]:
    # note: cells hold whole documents; csv's own limit is 128 KiB.
    csv.field_size_limit(2**30)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            for values in reader:
                if None in values or None in values.values():
                    raise UserError(f"{path}:{reader.line_num}: has not the {len(reader.fieldnames or ())} cells of the header")
                yield _row(values, f"{path}:{reader.line_num}")
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: not valid CSV ({error})") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        index = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    index += 1
                    yield _row(values, f"{path} row {index}")
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a whole parquet file ({str(error).splitlines()[0]})") from None


def _read_hub(name: str, split: str) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # noqa: BLE001 - the hub's client raises a dozen unrelated types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"dataset.source: {name!r} is no file here and could not be fetched from the hub, split {split!r}: {reason}"
        ) from None
    for index, values in enumerate(rows):
        yield _row(values, f"{name} row {index + 1}")


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def _row(values: Any, location: str) -> Row:
    if not isinstance(values, dict):
        raise UserError(f"{location}: holds {type(values).__name__} where an object with columns is due")
    return Row(values, location)
