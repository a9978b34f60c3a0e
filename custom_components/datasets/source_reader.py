"""The rows of one source to a data set of tokens, with an account of what became of each row."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from tqdm import tqdm

from custom_components.datasets.dialog_rules import DialogRules
from custom_components.datasets.file_readers import BadRow, Row
from custom_components.datasets.row_formats import Formats, check_format_name
from custom_components.datasets.row_tokenizer import RowReader, RowTokenizer, TokenizedChunk
from custom_components.datasets.source_list import SourceName, WeightedSource, weighted_sources
from custom_components.datasets.sources import Source, find_source
from custom_components.datasets.summary import DatasetSummary
from custom_components.datasets.token_cache import TokenCache
from custom_components.datasets.tokenized_rows import TokenizedRows, joined_arrays
from custom_components.runtime.errors import UserError
from custom_components.transforms.chat_transform import ChatTransform
from custom_components.transforms.turn_encoding import EncodedDialog

_NUM_RECORDS_PER_CHUNK = 1024

Rows_co = TypeVar("Rows_co", bound=TokenizedRows, covariant=True)


@dataclass(frozen=True)
class SourceReader(ABC, Generic[Rows_co]):
    """Turns the rows of a source into tokens. A subclass says what a row is: one dialog, or a pair of them.

    Attributes:
        formats: those that the rows may have.
        kind: in the key of the token cache, beside the settings.
    """

    source: Source
    settings: WeightedSource
    tokenizer: ChatTransform

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
            return self.dataset(arrays, self._summary(counts))
        dataset = self.read()
        cache.store(dataset.arrays, vars(dataset.summaries[0]))
        return dataset

    def read(self) -> Rows_co:
        """Read and tokenize the source's rows.

        Raises:
            UserError: a row is bad or too long and that is an error, or no row has a token to train on.
        """
        summary, rows = self._summary({}), self.row_tokenizer()
        parts: list[dict[str, np.ndarray]] = []
        first_text = ""
        try:
            for chunk in self._tokenized_chunks(rows, summary):
                summary.add(chunk.summary)
                first_text = first_text or chunk.first_text
                if chunk.refusal:
                    raise UserError(chunk.refusal)
                parts += [chunk.arrays] if chunk.arrays else []
        except UserError as error:
            raise UserError(*summary.bad_row_lines(), *error.messages) from None
        if rows.refuses(summary):
            *lines, last = summary.bad_row_lines()
            raise UserError(*lines, f"{last}; on_bad_row=skip leaves such rows out")
        if not parts:
            raise self._nothing_to_train_on(summary, first_text)
        summary.format = rows.rows.format_found
        return self.dataset(joined_arrays(parts), summary)

    def row_tokenizer(self) -> RowTokenizer:
        """Make what turns the source's records into tokens."""
        reader = self.row_reader(DialogRules(self.settings.on_uneven_turns, self.settings.on_empty_answer))
        return RowTokenizer(self.tokenizer, self.settings, reader, self.arrays, self.loss)

    def records(self) -> Iterator[Row | BadRow]:
        """Read the source's records, up to `max_rows`."""
        return self.source.records(self.settings.max_rows)

    def _summary(self, counts: Mapping[str, Any]) -> DatasetSummary:
        files = self.source.files.account if self.source.files else ""
        names = {"source": self.source.name, "split": self.source.split, "files": files}
        return DatasetSummary(**{**counts, **names})

    def _tokenized_chunks(self, rows: RowTokenizer, summary: DatasetSummary) -> Iterator[TokenizedChunk]:
        """Tokenize chunk after chunk.

        Args:
            summary: of the chunks before. After a bad row that is an error, the rows that follow are read only to name
                every kind of bad row at once.
        """
        name = f"tokenizing {self.source.name}"
        for chunk in _chunks(tqdm(self.records(), desc=name, unit="row", leave=False, delay=2, disable=None)):
            yield rows.tokenized(chunk, is_refused=rows.refuses(summary))
            if self.settings.streaming and rows.refuses(summary):
                return  # the rest would be fetched only to find more bad rows

    def _nothing_to_train_on(self, summary: DatasetSummary, first_text: str) -> UserError:
        reasons = f": of {summary.num_rows} rows " + ", ".join(summary.losses())
        limit = f" within max_seq_len {self.tokenizer.max_seq_len}" if summary.num_overlong or first_text else ""
        first = f"; the first is {first_text!r}" if first_text else ""
        return UserError(
            f"{self.source.key}: no row of {summary.source!r} has a token to train on{limit}{reasons}{first}",
            *summary.bad_row_lines(),
        )


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
    tokenizer: ChatTransform,
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


def _chunks(records: Iterable[Row | BadRow]) -> Iterator[list[Row | BadRow]]:
    """Cut records into chunks; what was read before an error is a chunk of its own, so that nothing is lost."""
    chunk: list[Row | BadRow] = []
    try:
        for record in records:
            chunk.append(record)
            if len(chunk) == _NUM_RECORDS_PER_CHUNK:
                yield chunk
                chunk = []
    except UserError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk
