"""What a preview shows of rows: where each is in its file, what becomes of it, and its tokens as they are trained."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from custom_components.datasets.file_readers import BadRow, Row
from custom_components.datasets.row_tokenizer import RowTokenizer, TokenizedChunk, location_of
from custom_components.datasets.source_reader import SourceReader
from custom_components.datasets.summary import counted
from custom_components.datasets.tokenized_rows import TokenizedRows
from custom_components.runtime.errors import UserError
from custom_components.runtime.terminal import visible
from custom_components.transforms.chat_transform import ChatTransform

_NUM_HISTOGRAM_BINS = 10
_HISTOGRAM_WIDTH = 40
_NUM_SHOWN_CHARACTERS = 400


@dataclass(frozen=True)
class Span:
    """A piece of a row's text.

    Attributes:
        is_control: the name of a token that text cannot spell, such as EOS.
    """

    text: str
    is_supervised: bool
    is_control: bool


@dataclass(frozen=True)
class TokenLine:
    """A token of a row by itself."""

    position: int
    token: int
    span: Span


@dataclass(frozen=True)
class ShownRow:
    """A row of a file.

    Attributes:
        name: its number and where it is.
        fate: how much of it is trained on, or why it is not.
        spans: its text as it is trained on; none if it is not.
        record: what the file holds instead, shortened, for a row that is not trained on.
        tokens: one by one, where they were asked for.
    """

    name: str
    fate: str
    spans: tuple[Span, ...] = ()
    record: str = ""
    tokens: tuple[TokenLine, ...] = ()


def rows_of_files(
    readers: Sequence[SourceReader],
    wanted: range,
    *,
    with_tokens: bool,
    kind: str = "row",
    held_out: Collection[bytes] = (),
) -> Iterator[ShownRow]:
    """Show records of the sources' files, whether they are trained on or not.

    Args:
        wanted: which of them, counted over all files from 0.
        with_tokens: also list each token.
        kind: what the rows are called.
        held_out: the digests of the rows that `val_fraction` keeps for validation.

    Raises:
        UserError: the files have fewer rows, or one is broken as a whole.
    """
    num_rows = 0
    for reader in readers:
        rows = reader.row_tokenizer()
        for record in reader.records():
            if num_rows in wanted:
                name = f"{kind} {num_rows}, {location_of(record)}"
                yield from _shown_record(name, record, reader, rows, with_tokens, held_out)
            elif not rows.rows.format_found:
                rows.tokenized([record])  # the first row decides the format
            num_rows += 1
            if num_rows == wanted.stop:
                return
    if num_rows <= wanted.start:
        raise UserError(f"row: {wanted.start} is not there, the files have the rows 0 to {num_rows - 1}")


def rows_of_dataset(
    dataset: TokenizedRows, tokenizer: ChatTransform, wanted: range, *, with_tokens: bool, kind: str = "row"
) -> Iterator[ShownRow]:
    """Show rows of a data set that a component of the user's own made, of whose files nothing is known.

    Raises:
        UserError: it has fewer rows.
    """
    if wanted.start >= len(dataset):
        raise UserError(f"row: {wanted.start} is not there, the data set has the rows 0 to {len(dataset) - 1}")
    for index in wanted:
        if index < len(dataset):
            for answer, row in _dialogs(dataset[index]):
                name = f"{kind} {index}{answer}"
                yield _trained_row(name, row["tokens"], row["labels"], "", tokenizer, with_tokens)


def row_spans(tokens: Sequence[int], labels: Sequence[int], tokenizer: ChatTransform) -> tuple[Span, ...]:
    """Write a row's tokens as text, cut where they become supervised or not, and around control tokens."""
    pieces = [
        (label != CROSS_ENTROPY_IGNORE_IDX, tokenizer.tokenizer.is_control(token), token)
        for token, label in zip(tokens, labels, strict=True)
    ]
    spans = []
    for (is_supervised, is_control), run in groupby(pieces, key=lambda piece: piece[:2]):
        ids = [token for _, _, token in run]
        for part in [[token] for token in ids] if is_control else [ids]:
            spans.append(Span(visible(tokenizer.text_of_pieces(part)), is_supervised, is_control))
    return tuple(spans)


def length_histogram(lengths: Sequence[int]) -> str:
    """Draw the rows by their number of tokens, as bars of text of at most 80 columns."""
    bin_width = -(-(max(lengths) + 1) // _NUM_HISTOGRAM_BINS)
    counts = [0] * _NUM_HISTOGRAM_BINS
    for length in lengths:
        counts[length // bin_width] += 1
    lines = []
    for index, count in enumerate(counts):
        bar = "#" * -(-count * _HISTOGRAM_WIDTH // max(counts))
        lines.append(f"{index * bin_width:>6} to {(index + 1) * bin_width - 1:<6} {bar} {count or ''}".rstrip())
    return "\n".join(lines)


def _shown_record(
    name: str,
    record: Row | BadRow,
    reader: SourceReader,
    rows: RowTokenizer,
    with_tokens: bool,
    held_out: Collection[bytes],
) -> Iterator[ShownRow]:
    chunk = rows.tokenized([record])
    if chunk.summary.num_kept == 0:
        yield ShownRow(name, f"not trained on: {_reason(chunk)}", record=_shortened(record))
        return
    dataset = reader.dataset(chunk.arrays, chunk.summary)
    notes = [*chunk.summary.losses(), *(["kept for validation"] if dataset.content_digest(0) in held_out else [])]
    remarks = "".join(f", {note}" for note in notes)
    for answer, row in _dialogs(dataset[0]):
        yield _trained_row(f"{name}{answer}", row["tokens"], row["labels"], remarks, rows.tokenizer, with_tokens)


def _dialogs(row: Mapping[str, Any]) -> list[tuple[str, Mapping[str, list[int]]]]:
    """Give a row's dialog, or of a pair the two, each with what it is called."""
    return [("", row)] if "tokens" in row else [(f", {answer}", row[answer]) for answer in ("chosen", "rejected")]


def _trained_row(
    name: str,
    tokens: list[int],
    labels: list[int],
    remarks: str,
    tokenizer: ChatTransform,
    with_tokens: bool,
) -> ShownRow:
    num_supervised = sum(label != CROSS_ENTROPY_IGNORE_IDX for label in labels)
    lines = [
        TokenLine(position, token, row_spans([token], [label], tokenizer)[0])
        for position, (token, label) in enumerate(zip(tokens, labels, strict=True))
        if with_tokens
    ]
    fate = f"{counted(len(tokens), 'token')}, {num_supervised} supervised{remarks}"
    return ShownRow(name, fate, row_spans(tokens, labels, tokenizer), tokens=tuple(lines))


def _reason(chunk: TokenizedChunk) -> str:
    for reason in (chunk.refusal, *(first for _, first in chunk.summary.bad_rows.values())):
        if reason:
            return reason.partition(": ")[2]
    return ", ".join(words.removeprefix("1 ") for words in chunk.summary.losses())


def _shortened(record: Row | BadRow) -> str:
    if isinstance(record, BadRow):
        return ""
    text = json.dumps(record.values, ensure_ascii=False, default=str)
    is_cut = len(text) > _NUM_SHOWN_CHARACTERS
    return visible(text[:_NUM_SHOWN_CHARACTERS] + (" ..." if is_cut else ""))
