"""The rows of one source to a data set of tokens, with an account of what became of each row."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from tqdm import tqdm

from custom_components.datasets.dialog_rules import DialogRules
from custom_components.datasets.file_readers import BadRow, Row
from custom_components.datasets.row_formats import Formats, check_format_name
from custom_components.datasets.row_messages import RowNotes
from custom_components.datasets.source_list import SourceName, WeightedSource, weighted_sources
from custom_components.datasets.sources import Source, find_source
from custom_components.datasets.summary import DatasetSummary
from custom_components.datasets.token_cache import TokenCache
from custom_components.datasets.tokenized_rows import TokenizedRows, joined_arrays
from custom_components.runtime.errors import UserError
from custom_components.transforms.dialogs import ChatMessage
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.transforms.templates import Turn
from custom_components.transforms.turn_encoding import EncodedDialog

_NUM_ROWS_PER_ENCODE = 1024

Rows_co = TypeVar("Rows_co", bound=TokenizedRows, covariant=True)


class RowReader(Protocol):
    """Reads the rows of one source, in the format of the first row that has one."""

    @property
    def format_found(self) -> str:
        """The name of that format; empty before it is known."""

    def dialogs(self, row: Row) -> tuple[Sequence[Sequence[ChatMessage]], RowNotes]:
        """Give the dialogs of a row, none if nothing of it is to be trained, and what there is to say of it.

        Raises:
            ValueError: the row is bad.
        """


@dataclass(frozen=True)
class SourceReader(ABC, Generic[Rows_co]):
    """Turns the rows of a source into tokens. A subclass says what a row is: one dialog, or a pair of them.

    Attributes:
        formats: those that the rows may have.
        kind: in the key of the token cache, beside the settings.
    """

    source: Source
    settings: WeightedSource
    tokenizer: Llama2ChatTransform

    formats: ClassVar[Formats]
    kind: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def row_reader(self, rules: DialogRules) -> RowReader:
        """Make the reader of the source's rows."""

    @abstractmethod
    def dataset(self, arrays: Mapping[str, np.ndarray], summary: DatasetSummary) -> Rows_co:
        """Make the data set of all rows in `arrays`."""

    @abstractmethod
    def arrays(self, rows: Sequence[Sequence[EncodedDialog]]) -> dict[str, np.ndarray]:
        """Lay out the rows that are kept, none of them over `max_seq_len`, end to end."""

    def loss(self, row: Sequence[EncodedDialog]) -> str | None:
        """Say why a row that could be trained on is left out, in the words of the account; None: it is not."""
        return None

    def cached(self, cache_dir: str | Path | None) -> Rows_co:
        """Read the source's rows, from the cache if the same rows were tokenized with the same settings before."""
        decisive = [self.settings.model_dump(exclude={"source", "weight"}), self.tokenizer.fingerprint, *self.kind]
        cache = TokenCache(cache_dir, self.source.files.paths if self.source.files else [], decisive)
        if (stored := cache.load()) is not None:
            arrays, counts = stored
            return self.dataset(arrays, self.summary(counts))
        dataset = self.read()
        cache.store(dataset.arrays, vars(dataset.summaries[0]))
        return dataset

    def summary(self, counts: Mapping[str, Any]) -> DatasetSummary:
        files = self.source.files.account if self.source.files else ""
        names = {"source": self.source.name, "split": self.source.split, "files": files}
        return DatasetSummary(**{**counts, **names})

    def read(self) -> Rows_co:
        settings, summary = self.settings, self.summary({})
        reader = self.row_reader(DialogRules(settings.on_uneven_turns, settings.on_empty_answer))
        chunks: list[dict[str, np.ndarray]] = []
        first_text = ""
        try:
            rendered = self.rendered(reader, summary)
            while chunk := list(islice(rendered, _NUM_ROWS_PER_ENCODE)):
                kept = []
                for location, row in self.encode(chunk):
                    first_text = first_text or self.tokenizer.decode(row[0].tokens)[:200]
                    if self.keeps(location, row, summary):
                        kept.append([self.cut(dialog) for dialog in row])
                if kept:
                    chunks.append(self.arrays(kept))
                    summary.num_kept += len(kept)
        except UserError as error:
            raise UserError(*summary.bad_row_lines(), *error.messages) from None
        if self.is_refused(summary):
            raise UserError(*summary.bad_row_lines())
        if not chunks:
            raise self.nothing_to_train_on(summary, first_text)
        summary.format = reader.format_found
        return self.dataset(joined_arrays(chunks), summary)

    def cut(self, dialog: EncodedDialog) -> EncodedDialog:
        cut = self.tokenizer.max_seq_len
        return EncodedDialog(dialog.tokens[:cut], dialog.is_supervised[:cut])

    def rows(self, summary: DatasetSummary) -> Iterator[Row]:
        def count(bad_row: BadRow) -> None:
            location, _, reason = str(bad_row).partition(": ")
            summary.num_rows += 1
            summary.count_bad_row(location, reason)

        return self.source.rows(count)

    def rendered(self, reader: RowReader, summary: DatasetSummary) -> Iterator[tuple[str, list[list[Turn]]]]:
        """Render the dialogs of the rows that have any; yields each row with its location.

        After a bad row that is an error, the rows that follow are read only to name every kind of bad row at once.
        """
        rows = islice(self.rows(summary), self.settings.max_rows)
        for row in tqdm(rows, desc=f"tokenizing {self.source.name}", unit="row", leave=False, delay=2, disable=None):
            summary.num_rows += 1
            try:
                dialogs, notes = reader.dialogs(row)
                turns = [self.tokenizer.render(dialog) for dialog in dialogs]
            except ValueError as error:
                summary.count_bad_row(row.location, str(error))
            else:
                summary.count_notes(row.location, notes)
                if turns and not self.is_refused(summary):
                    yield row.location, turns
            if self.settings.streaming and self.is_refused(summary):
                return  # the rest would be fetched only to find more bad rows

    def is_refused(self, summary: DatasetSummary) -> bool:
        return self.settings.on_bad_row == "error" and summary.num_bad > 0

    def encode(self, rendered: Sequence[tuple[str, list[list[Turn]]]]) -> Iterator[tuple[str, list[EncodedDialog]]]:
        """Tokenize rendered rows; yields each with its location."""
        encoded = iter(self.tokenizer.encode_turns([turns for _, row in rendered for turns in row]))
        for location, row in rendered:
            yield location, list(islice(encoded, len(row)))

    def nothing_to_train_on(self, summary: DatasetSummary, first_text: str) -> UserError:
        reasons = f": of {summary.num_rows} rows " + ", ".join(summary.losses())
        limit = f" within max_seq_len {self.tokenizer.max_seq_len}" if summary.num_overlong or first_text else ""
        first = f"; the first is {first_text!r}" if first_text else ""
        return UserError(
            f"{self.source.key}: no row of {summary.source!r} has a token to train on{limit}{reasons}{first}",
            *summary.bad_row_lines(),
        )

    def keeps(self, location: str, row: Sequence[EncodedDialog], summary: DatasetSummary) -> bool:
        """Decide whether a row is trained on, and count it."""
        cut = self.tokenizer.max_seq_len
        overlong = [dialog.tokens for dialog in row if cut is not None and len(dialog.tokens) > cut]
        if overlong and self.settings.on_overlong == "error":
            text = self.tokenizer.decode(overlong[0])[:60]
            raise UserError(f"{location}: has {len(overlong[0])} tokens, max_seq_len is {cut}: {text!r}")
        if overlong and self.settings.on_overlong == "drop":
            summary.num_overlong += 1
            return False
        # The first token is never predicted, so it does not count as supervised.
        nums_supervised = [sum(dialog.is_supervised[1:cut]) for dialog in row]
        if not all(nums_supervised):
            summary.num_unsupervised += 1
            return False
        if (reason := self.loss(row)) is not None:
            summary.notes[reason] = summary.notes.get(reason, 0) + 1
            return False
        nums_tokens = [len(dialog.tokens[:cut]) for dialog in row]
        summary.num_truncated += bool(overlong)
        summary.num_tokens += sum(nums_tokens)
        summary.num_supervised_tokens += sum(nums_supervised)
        summary.longest_row_tokens = max(summary.longest_row_tokens, *nums_tokens)
        return True


def laid_out(dialogs: Sequence[EncodedDialog]) -> dict[str, np.ndarray]:
    """Lay dialogs end to end: their tokens, which are supervised, and where each ends."""
    return {
        "tokens": np.concatenate([np.array(dialog.tokens, np.int32) for dialog in dialogs]),
        "is_supervised": np.concatenate([np.array(dialog.is_supervised, bool) for dialog in dialogs]),
        "ends": np.cumsum([0, *(len(dialog.tokens) for dialog in dialogs)], dtype=np.int64),
    }


Reader = TypeVar("Reader", bound=SourceReader)


def source_readers(
    reader: type[Reader],
    tokenizer: Llama2ChatTransform,
    source: SourceName | list[SourceName | WeightedSource],
    **for_all: Any,
) -> list[Reader]:
    """Find the sources of a data set and make a reader for each, before any row is read.

    Args:
        for_all: the settings of sources that have none of their own.

    Raises:
        UserError: see :func:`weighted_sources`, :func:`check_format_name` and :func:`find_source`.
    """
    readers = []
    for key, part in weighted_sources(source, for_all).items():
        if part.format is not None:
            check_format_name(part.format, reader.formats)
        found = find_source(part.source, part.split, part.subset, part.revision, part.streaming, key)
        readers.append(reader(found, part, tokenizer.with_system_prompt(part.system_prompt)))
    return readers
