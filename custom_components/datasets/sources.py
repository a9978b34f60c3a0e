"""Rows of files and of data sets on the hub, each with the place it came from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from custom_components.datasets.file_readers import BadRow, Row, read_file
from custom_components.datasets.source_files import SourceFiles, is_on_hub, source_files
from custom_components.runtime.errors import UserError

_KEY = "dataset.source"


def _raise(bad_row: BadRow) -> None:
    raise bad_row


@dataclass(frozen=True)
class Source:
    """A source that was found: local files, or a data set on the hub if there are none.

    Attributes:
        split, subset, revision, streaming: of a data set on the hub; of files only `split`, see :func:`source_files`.
        key: what errors call the source.
    """

    name: str
    split: str
    subset: str | None
    revision: str | None
    streaming: bool
    files: SourceFiles | None
    key: str

    def rows(self, on_bad_row: Callable[[BadRow], None] = _raise) -> Iterator[Row]:
        """Read the rows one by one.

        Args:
            on_bad_row: called with a record that is broken; if it returns, reading continues after that record.

        Raises:
            UserError: a file is broken as a whole, named by its line if it has any, or there is no row at all.
            BadRow: a single record is broken, named by its line, unless `on_bad_row` returns.
        """
        for record in self.records():
            if isinstance(record, BadRow):
                on_bad_row(record)
            else:
                yield record

    def records(self, max_rows: int | None = None) -> Iterator[Row | BadRow]:
        """Read the rows one by one, with the broken records between them.

        Args:
            max_rows: end after so many rows; broken records do not count.

        Raises:
            UserError: a file is broken as a whole, named by its line if it has any, or there is no row at all.
        """
        num_rows = num_bad_rows = 0
        for record in self._records():
            is_bad = isinstance(record, BadRow)
            num_bad_rows += is_bad
            num_rows += not is_bad
            yield record
            if num_rows == max_rows:
                return
        if num_rows == 0:
            reason = f": all {num_bad_rows} records are broken" if num_bad_rows else ""
            raise UserError(f"{self.key}: {self.name!r} has no rows{reason}")

    def _records(self) -> Iterator[Row | BadRow]:
        if self.files is None:
            yield from self._hub_rows()
        else:
            for path in self.files.paths:
                yield from read_file(path)

    def _hub_rows(self) -> Iterator[Row]:
        import datasets

        num_rows = 0
        try:
            for values in datasets.load_dataset(
                self.name, self.subset, split=self.split, revision=self.revision, streaming=self.streaming
            ):
                num_rows += 1
                yield Row(values, f"{self.name} row {num_rows}")
        except Exception as error:  # noqa: BLE001 - the hub's client raises a dozen unrelated types
            details = {"split": self.split, "subset": self.subset, "revision": self.revision}
            where = f", after row {num_rows}" if num_rows else ""
            what = "".join(f", {key} {value!r}" for key, value in details.items() if value is not None)
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(
                f"{self.key}: {self.name!r} is no file here and could not be fetched from the hub{what}{where}: "
                f"{reason}"
            ) from None


def find_source(
    name: str,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    key: str = _KEY,
) -> Source:
    """Find a source by its name, before anything of it is read.

    Args:
        name: a .jsonl, .json, .csv or .tsv file, these also with .gz, or a .parquet, .arrow or .feather file; a folder
            or a glob such as `data/*.jsonl` of them, read in the order of their names, see :func:`source_files`; or
            else a data set's name on the hub, `owner/name`.
        split: of a folder or of a data set on the hub.
        subset, revision, streaming: of a data set on the hub.
        key: what errors call the source.

    Raises:
        UserError: there is no such file, split or kind of file, or a setting does not apply to files.
    """
    if not name.strip():
        raise UserError(f"{key}: is empty; name a file, a folder, a glob or a data set on the hub")
    if is_on_hub(name):
        return Source(name, split, subset, revision, streaming, None, key)
    node = key.rpartition(".")[0]
    refused = {"subset": subset, "revision": revision, "streaming": streaming or None}
    instead = {
        "subset": f"name the files of that subset in {key}",
        "revision": f"name the files of that revision in {key}",
        "streaming": "files are read row by row anyway; set it to false",
    }
    problems = [
        f"{node}.{setting}: {value!r} is for data sets on the hub, {name!r} is not one; {instead[setting]}".lstrip(".")
        for setting, value in refused.items()
        if value is not None
    ]
    if problems:
        raise UserError(*problems)
    return Source(name, split, subset, revision, streaming, source_files(name, split, key), key)


def read_rows(name: str, key: str = _KEY, on_bad_row: Callable[[BadRow], None] = _raise) -> Iterator[Row]:
    """Read the rows of a source's `train` split; see :func:`find_source` and :meth:`Source.rows`."""
    yield from find_source(name, key=key).rows(on_bad_row)
