"""A source of dialogs to a data set ready to train on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import PositiveInt
from tqdm import tqdm

from custom_components.datasets.dialog_reader import DialogReader
from custom_components.datasets.dialog_rules import DialogRules, OnEmptyAnswer, OnUnevenTurns
from custom_components.datasets.file_readers import BadRow, Row
from custom_components.datasets.row_formats import check_format_name
from custom_components.datasets.source_list import SourceName, WeightedSource, weighted_sources
from custom_components.datasets.sources import Source, find_source
from custom_components.datasets.summary import DatasetSummary
from custom_components.datasets.token_cache import TokenCache
from custom_components.datasets.tokenized_rows import ChatDataset, mixed
from custom_components.runtime.errors import UserError
from custom_components.transforms.llama2_chat import EncodedDialog, Llama2ChatTransform
from custom_components.transforms.templates import Turn

_NUM_ROWS_PER_ENCODE = 1024


def chat_dataset(
    tokenizer: Llama2ChatTransform,
    source: SourceName | list[SourceName | WeightedSource],
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    max_rows: PositiveInt | None = None,
    format: str | None = None,
    column_map: dict[str, str] | None = None,
    system_prompt: str | None = None,
    on_overlong: Literal["truncate", "drop", "error"] = "truncate",
    on_bad_row: Literal["error", "skip"] = "error",
    on_uneven_turns: OnUnevenTurns = "error",
    on_empty_answer: OnEmptyAnswer = "drop",
    cache_dir: str | Path | None = None,
) -> ChatDataset:
    """Read and tokenize a source of dialogs, or several.

    Args:
        tokenizer: the transform, with the prompt template and `max_seq_len`.
        source: a file, a folder or glob of them, or a data set's name on the hub, see :func:`find_source`; or a list of
            these, or of `{source, weight, ...}`, see :class:`WeightedSource`.
        split: of a folder or of a data set on the hub.
        subset, revision: of a data set on the hub.
        streaming: read a data set on the hub without downloading it whole, for those larger than the disk. Tokens are
            held in memory, 5 bytes each, so order, packing and resuming work as without.
        max_rows: read at most so many rows of each source.
        format: one of :mod:`row_formats`; None: recognised from the columns.
        column_map: the file's name for each of our columns that it names differently: `{prompt: question}`.
        system_prompt: for dialogs that have none of their own; None: the tokenizer's.
        on_overlong: what happens to rows over `max_seq_len`: "truncate" cuts them, without a false EOS.
        on_bad_row: "skip" drops and counts rows that cannot be read as a dialog; "error" names the first of each kind.
        on_uneven_turns, on_empty_answer: see :class:`DialogRules`.
        cache_dir: tokens of local files are kept here for later runs; None: they are not kept.

    Raises:
        UserError: a source or row cannot be read, named by file and line; or no row has a token to train on.
    """
    for_all = {
        **{"split": split, "subset": subset, "revision": revision, "streaming": streaming, "max_rows": max_rows},
        **{"format": format, "column_map": column_map or {}, "system_prompt": system_prompt},
        **{"on_overlong": on_overlong, "on_bad_row": on_bad_row},
        **{"on_uneven_turns": on_uneven_turns, "on_empty_answer": on_empty_answer},
    }
    readers = []
    for key, part in weighted_sources(source, for_all).items():
        if part.format is not None:
            check_format_name(part.format)
        found = find_source(part.source, part.split, part.subset, part.revision, part.streaming, key)
        readers.append(_Reader(found, part, tokenizer.with_system_prompt(part.system_prompt)))
    return mixed([(reader.cached(cache_dir), reader.settings.weight) for reader in readers])


@dataclass(frozen=True)
class _Reader:
    """Turns the rows of a source into tokens; see :func:`chat_dataset`."""

    source: Source
    settings: WeightedSource
    tokenizer: Llama2ChatTransform

    def cached(self, cache_dir: str | Path | None) -> ChatDataset:
        """Read the source's rows, from the cache if the same rows were tokenized with the same settings before."""
        decisive = [self.settings.model_dump(exclude={"source", "weight"}), self.tokenizer.fingerprint]
        cache = TokenCache(cache_dir, self.source.files.paths if self.source.files else [], decisive)
        if (stored := cache.load()) is not None:
            arrays, counts = stored
            rows = np.arange(len(arrays["ends"]) - 1)
            return ChatDataset(**arrays, rows=rows, summaries=[self.summary(counts)])
        dataset = self.read()
        cache.store(dataset.arrays, vars(dataset.summaries[0]))
        return dataset

    def summary(self, counts: Mapping[str, Any]) -> DatasetSummary:
        files = self.source.files.account if self.source.files else ""
        names = {"source": self.source.name, "split": self.source.split, "files": files}
        return DatasetSummary(**{**counts, **names})

    def read(self) -> ChatDataset:
        settings, summary = self.settings, self.summary({})
        rules = DialogRules(settings.on_uneven_turns, settings.on_empty_answer)
        dialogs = DialogReader(settings.format, settings.column_map, rules)
        token_chunks: list[np.ndarray] = []
        supervised_chunks: list[np.ndarray] = []
        lengths: list[int] = []
        first_text = ""
        try:
            rendered = self.rendered(dialogs, summary)
            while chunk := list(islice(rendered, _NUM_ROWS_PER_ENCODE)):
                for location, encoded in self.encode(chunk):
                    first_text = first_text or self.tokenizer.decode(encoded.tokens)[:200]
                    if self.keeps(location, encoded, summary):
                        cut = self.tokenizer.max_seq_len
                        token_chunks.append(np.array(encoded.tokens[:cut], np.int32))
                        supervised_chunks.append(np.array(encoded.is_supervised[:cut], bool))
                        lengths.append(len(encoded.tokens[:cut]))
        except UserError as error:
            raise UserError(*summary.bad_row_lines(), *error.messages) from None
        if self.is_refused(summary):
            raise UserError(*summary.bad_row_lines())
        if not lengths:
            raise self.nothing_to_train_on(summary, first_text)
        summary.format = dialogs.row_format.name if dialogs.row_format else ""
        summary.num_kept = len(lengths)
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        return ChatDataset(
            np.concatenate(token_chunks), np.concatenate(supervised_chunks), ends, np.arange(len(lengths)), [summary]
        )

    def rows(self, summary: DatasetSummary) -> Iterator[Row]:
        def count(bad_row: BadRow) -> None:
            location, _, reason = str(bad_row).partition(": ")
            summary.num_rows += 1
            summary.count_bad_row(location, reason)

        return self.source.rows(count)

    def rendered(self, dialogs: DialogReader, summary: DatasetSummary) -> Iterator[tuple[str, list[Turn]]]:
        """Render the rows that are dialogs; yields each with its location.

        After a bad row that is an error, the rows that follow are read only to name every kind of bad row at once.
        """
        rows = islice(self.rows(summary), self.settings.max_rows)
        for row in tqdm(rows, desc=f"tokenizing {self.source.name}", unit="row", leave=False, delay=2, disable=None):
            summary.num_rows += 1
            try:
                dialog, notes = dialogs.dialog(row)
                turns = self.tokenizer.render(dialog) if dialog else []
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

    def encode(self, rendered: Sequence[tuple[str, list[Turn]]]) -> Iterator[tuple[str, EncodedDialog]]:
        """Tokenize rendered dialogs; yields each with its location."""
        locations, dialogs = zip(*rendered, strict=True)
        yield from zip(locations, self.tokenizer.encode_turns(dialogs), strict=True)

    def nothing_to_train_on(self, summary: DatasetSummary, first_text: str) -> UserError:
        reasons = f": of {summary.num_rows} rows " + ", ".join(summary.losses())
        limit = f" within max_seq_len {self.tokenizer.max_seq_len}" if summary.num_overlong or first_text else ""
        first = f"; the first is {first_text!r}" if first_text else ""
        return UserError(
            f"{self.source.key}: no row of {summary.source!r} has a token to train on{limit}{reasons}{first}",
            *summary.bad_row_lines(),
        )

    def keeps(self, location: str, encoded: EncodedDialog, summary: DatasetSummary) -> bool:
        """Decide whether a row is trained on, and count it."""
        tokens, cut = encoded.tokens, self.tokenizer.max_seq_len
        if cut is not None and len(tokens) > cut:
            if self.settings.on_overlong == "error":
                text = self.tokenizer.decode(tokens)[:60]
                raise UserError(f"{location}: has {len(tokens)} tokens, max_seq_len is {cut}: {text!r}")
            if self.settings.on_overlong == "drop":
                summary.num_overlong += 1
                return False
        # The first token is never predicted, so it does not count as supervised.
        num_supervised = sum(encoded.is_supervised[1:cut])
        if num_supervised == 0:
            summary.num_unsupervised += 1
            return False
        num_tokens = len(tokens[:cut])
        summary.num_truncated += num_tokens < len(tokens)
        summary.num_tokens += num_tokens
        summary.num_supervised_tokens += num_supervised
        summary.longest_row_tokens = max(summary.longest_row_tokens, num_tokens)
        return True
