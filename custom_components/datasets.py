"""A data set ready to train on: every row as token ids and a mask, and an account of what became of each."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

import numpy as np
from torch.utils.data import Dataset
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from tqdm import tqdm

from custom_components.data_sources import BadRow, Row, read_rows
from custom_components.errors import UserError
from custom_components.prompts import ChatMessage
from custom_components.row_formats import RowFormat, format_by_name, recognised_format, renamed
from custom_components.token_cache import TokenCache
from custom_components.transforms import Llama2ChatTransform

_NUM_ROWS_PER_ENCODE = 1024


@dataclass
class DatasetSummary:
    """What became of the rows of a source, in counts."""

    source: str
    format: str = ""
    num_rows: int = 0
    num_kept: int = 0
    num_bad: int = 0
    num_overlong: int = 0
    num_unsupervised: int = 0
    num_truncated: int = 0
    num_empty_messages: int = 0
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    longest_row_tokens: int = 0

    def __str__(self) -> str:
        losses = {
            "dropped (bad rows)": self.num_bad,
            "dropped (over max_seq_len)": self.num_overlong,
            "dropped (nothing to train on)": self.num_unsupervised,
            "truncated": self.num_truncated,
            "with an empty question or answer": self.num_empty_messages,
        }
        return ", ".join(
            [
                f"{self.source} ({self.format}): {self.num_rows} rows, {self.num_kept} kept",
                *(f"{count} {what}" for what, count in losses.items() if count),
                f"{self.num_tokens} tokens, {self.num_supervised_tokens} supervised",
                f"longest {self.longest_row_tokens}",
            ]
        )


class ChatDataset(Dataset):
    """Rows as `{"tokens": list[int], "labels": list[int]}`, held as flat arrays.

    `labels[i]` is `tokens[i]` where that token is trained on, else torchtune's ignore index: not shifted yet.

    Attributes:
        summaries: one of each source.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        is_masked: np.ndarray,
        ends: np.ndarray,
        rows: np.ndarray,
        summaries: Sequence[DatasetSummary],
    ) -> None:
        self._tokens = tokens
        self._is_masked = is_masked
        self._ends = ends  # row i lies in ends[i] .. ends[i + 1]
        self._rows = rows  # which of the rows there are this data set's, in order
        self.summaries = list(summaries)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return np.diff(self._ends)[self._rows].tolist()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = slice(*self._ends[self._rows[index] : self._rows[index] + 2])
        labels = np.where(self._is_masked[row], CROSS_ENTROPY_IGNORE_IDX, self._tokens[row])
        return {"tokens": self._tokens[row].tolist(), "labels": labels.tolist()}

    def rows(self, indices: Sequence[int]) -> "ChatDataset":
        """A data set of some of the rows, which may repeat; the arrays are shared."""
        return ChatDataset(self._tokens, self._is_masked, self._ends, self._rows[indices], self.summaries)

    def content_digest(self, index: int) -> bytes:
        """A hash of a row's tokens: equal for equal rows."""
        row = slice(*self._ends[self._rows[index] : self._rows[index] + 2])
        return hashlib.sha256(self._tokens[row].tobytes()).digest()


class WeightedSource(TypedDict):
    """One of several sources; `weight` is how often its rows are seen in an epoch, by default 1; 0.5 takes half."""

    source: str
    weight: NotRequired[float]


def chat_dataset(
    tokenizer: Llama2ChatTransform,
    source: str | list[WeightedSource],
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    max_rows: int | None = None,
    format: str | None = None,
    column_map: dict[str, str] | None = None,
    system_prompt: str | None = None,
    on_overlong: Literal["truncate", "drop", "error"] = "truncate",
    on_bad_row: Literal["error", "skip"] = "error",
    cache_dir: str | Path | None = None,
) -> ChatDataset:
    """Read and tokenize a source of dialogs, or several.

    Args:
        tokenizer: the transform, with the prompt template and `max_seq_len`.
        source: a file, a folder or glob of them, or a data set's name on the hub, see :func:`read_rows`; or a list of
            `{source, weight}`.
        split, subset, revision: of a data set on the hub.
        streaming: read a data set on the hub without downloading it whole, for those larger than the disk. Tokens are
            held in memory, 5 bytes each, so that order, packing and resuming are the same as without.
        max_rows: read so many rows of each source and no more.
        format: one of :mod:`row_formats`; None: recognised from the columns.
        column_map: the file's column for each of ours, where the names differ: `{prompt: question}`.
        system_prompt: for dialogs that have none of their own.
        on_overlong: what happens to rows over `max_seq_len`: "truncate" cuts them, without a false EOS.
        on_bad_row: "skip" drops and counts rows that cannot be read as a dialog.
        cache_dir: tokens of local files are kept here and read back by later runs; None: they are not.

    Raises:
        UserError: a source or row that cannot be read, by file and line; or no row with a token to train on.
    """
    reader = _Reader(
        *(tokenizer, split, subset, revision, streaming, max_rows),
        *(format, column_map or {}, system_prompt, on_overlong, on_bad_row),
    )
    sources = [WeightedSource(source=source)] if isinstance(source, str) else source
    if not sources:
        raise UserError("dataset.source: is an empty list; name a file or a data set on the hub")
    parts = [(reader.cached(part["source"], cache_dir), part.get("weight", 1.0)) for part in sources]
    return _mixed(parts)


def split_validation(dataset: ChatDataset, val_fraction: float, seed: int) -> tuple[ChatDataset, ChatDataset]:
    """A data set without, and one with, about `val_fraction` of its rows, drawn by `seed`.

    Equal rows are drawn together, so that no validation row is trained on under another number.

    Raises:
        UserError: one of the two would be empty.
    """
    salt = seed.to_bytes(8, "little")
    draws = [
        int.from_bytes(hashlib.sha256(salt + dataset.content_digest(index)).digest()[:8], "little") / 2**64
        for index in range(len(dataset))
    ]
    # The rows of the lowest draws, rather than those under the fraction, so that small sets get their share too.
    threshold = sorted(draws)[min(len(draws) - 1, max(0, round(val_fraction * len(draws)) - 1))]
    validation = [index for index, draw in enumerate(draws) if draw <= threshold]
    training = [index for index, draw in enumerate(draws) if draw > threshold]
    if not training:
        raise UserError(f"val_fraction: {val_fraction} of {len(draws)} rows leaves nothing to train on; lower it")
    return dataset.rows(training), dataset.rows(validation)


def _mixed(parts: Sequence[tuple[ChatDataset, float]]) -> ChatDataset:
    """Parts end to end, each row as often as its part's weight says; a fraction takes evenly spread rows."""
    tokens = np.concatenate([part._tokens for part, _ in parts])
    is_masked = np.concatenate([part._is_masked for part, _ in parts])
    lengths = np.concatenate([np.diff(part._ends) for part, _ in parts])
    ends = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
    rows, num_before = [], 0
    for part, weight in parts:
        num_taken = round(len(part) * weight)
        rows.append(num_before + (np.arange(num_taken) * len(part)) // max(1, num_taken) % len(part))
        num_before += len(part)
    if not any(len(part_rows) for part_rows in rows):
        raise UserError("dataset.source: the weights leave no row to train on")
    return ChatDataset(tokens, is_masked, ends, np.concatenate(rows), [part.summaries[0] for part, _ in parts])


@dataclass(frozen=True)
class _Reader:
    """How the rows of a source become tokens; see :func:`chat_dataset`."""

    tokenizer: Llama2ChatTransform
    split: str
    subset: str | None
    revision: str | None
    streaming: bool
    max_rows: int | None
    format: str | None
    column_map: dict[str, str]
    system_prompt: str | None
    on_overlong: str
    on_bad_row: str

    def cached(self, source: str, cache_dir: str | Path | None) -> ChatDataset:
        """The source's rows, from the cache where the same were tokenized alike before."""
        settings = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "tokenizer"}
        cache = TokenCache(cache_dir, source, [settings, self.tokenizer.fingerprint])
        if (stored := cache.load()) is not None:
            arrays, counts = stored
            rows = np.arange(len(arrays["ends"]) - 1)
            return ChatDataset(**arrays, rows=rows, summaries=[DatasetSummary(**{**counts, "source": source})])
        dataset = self.read(source)
        arrays = {"tokens": dataset._tokens, "is_masked": dataset._is_masked, "ends": dataset._ends}
        cache.store(arrays, vars(dataset.summaries[0]))
        return dataset

    def read(self, source: str) -> ChatDataset:
        summary = DatasetSummary(source)

        def refuse_or_count(bad_row: BadRow) -> None:
            if self.on_bad_row == "error":
                raise bad_row
            summary.num_rows += 1
            summary.num_bad += 1

        every_row = read_rows(
            source,
            self.split,
            subset=self.subset,
            revision=self.revision,
            streaming=self.streaming,
            on_bad_row=refuse_or_count,
        )
        rows = islice(every_row, self.max_rows)
        first = next(rows)
        row_format = self.row_format(first)
        summary.format = row_format.name
        token_chunks: list[np.ndarray] = []
        mask_chunks: list[np.ndarray] = []
        lengths: list[int] = []
        first_text = ""
        with tqdm(desc=f"tokenizing {source}", unit="row", leave=False, delay=2) as progress:
            chunk = [first, *islice(rows, _NUM_ROWS_PER_ENCODE - 1)]
            while chunk:
                for location, tokens, mask in self.encode(chunk, row_format, summary):
                    first_text = first_text or self.tokenizer.decode(tokens)[:200]
                    if self.keeps(location, tokens, mask, summary):
                        cut = self.tokenizer.max_seq_len
                        token_chunks.append(np.array(tokens[:cut], np.int32))
                        mask_chunks.append(np.array(mask[:cut], bool))
                        lengths.append(len(tokens[:cut]))
                progress.update(len(chunk))
                chunk = list(islice(rows, _NUM_ROWS_PER_ENCODE))
        if not lengths:
            raise UserError(
                f"dataset.source: no row of {source!r} has a token to train on within max_seq_len "
                f"{self.tokenizer.max_seq_len}; the first is {first_text!r}"
                + (f" ({summary.num_bad} bad rows were skipped)" if summary.num_bad else "")
            )
        summary.num_kept = len(lengths)
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        return ChatDataset(
            np.concatenate(token_chunks), np.concatenate(mask_chunks), ends, np.arange(len(lengths)), [summary]
        )

    def row_format(self, first: Row) -> RowFormat:
        try:
            values = renamed(first.values, self.column_map)
            if self.format is not None:
                return format_by_name(self.format, values.keys())
            return recognised_format(values.keys(), values, self.column_map.keys())
        except ValueError as error:
            raise UserError(f"{first.location}: {error}") from None

    def encode(
        self, rows: Sequence[Row], row_format: RowFormat, summary: DatasetSummary
    ) -> Iterator[tuple[str, list[int], list[bool]]]:
        """Location, tokens and mask of each of the rows that is a dialog."""
        locations, dialogs = [], []
        for row in rows:
            summary.num_rows += 1
            try:
                dialog = self.dialog(row, row_format)
                self.tokenizer.check(dialog)
            except ValueError as error:
                if self.on_bad_row == "error":
                    raise UserError(f"{row.location}: {error}") from None
                summary.num_bad += 1
                continue
            summary.num_empty_messages += any(not message.content for message in dialog)
            locations.append(row.location)
            dialogs.append(dialog)
        for location, (tokens, mask) in zip(locations, self.tokenizer.encode_dialogs(dialogs), strict=True):
            yield location, tokens, mask

    def dialog(self, row: Row, row_format: RowFormat) -> list[ChatMessage]:
        dialog = row_format.convert(renamed(row.values, self.column_map))
        if self.system_prompt is not None and dialog[0].role == "user":
            return [ChatMessage("system", self.system_prompt), *dialog]
        return dialog

    def keeps(self, location: str, tokens: list[int], mask: list[bool], summary: DatasetSummary) -> bool:
        """Whether a row is trained on; counts it."""
        cut = self.tokenizer.max_seq_len
        if cut is not None and len(tokens) > cut:
            if self.on_overlong == "error":
                text = self.tokenizer.decode(tokens)[:60]
                raise UserError(f"{location}: has {len(tokens)} tokens, max_seq_len is {cut}: {text!r}")
            if self.on_overlong == "drop":
                summary.num_overlong += 1
                return False
        # The first token is never predicted, so it does not count as supervised.
        num_supervised = len(mask[1:cut]) - sum(mask[1:cut])
        if num_supervised == 0:
            summary.num_unsupervised += 1
            return False
        num_tokens = len(tokens[:cut])
        summary.num_truncated += num_tokens < len(tokens)
        summary.num_tokens += num_tokens
        summary.num_supervised_tokens += num_supervised
        summary.longest_row_tokens = max(summary.longest_row_tokens, num_tokens)
        return True
