"""A data set ready to train on: every row as token ids and labels, and an account of what became of each."""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from torch.utils.data import Dataset
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from custom_components.data_sources import Row, read_rows
from custom_components.errors import UserError
from custom_components.row_formats import RowConverter, recognised_format
from custom_components.transforms import Llama2ChatTransform

_NUM_ROWS_PER_ENCODE = 1024


@dataclass
class DatasetSummary:
    """What became of the rows of a source, in counts."""

    source: str
    format: str
    num_rows: int = 0
    num_kept: int = 0
    num_unsupervised: int = 0
    num_truncated: int = 0
    num_empty_messages: int = 0
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    longest_row_tokens: int = 0

    def __str__(self) -> str:
        parts = [f"{self.source} ({self.format}): {self.num_rows} rows, {self.num_kept} kept"]
        if self.num_unsupervised:
            parts.append(f"{self.num_unsupervised} dropped (nothing to train on)")
        if self.num_truncated:
            parts.append(f"{self.num_truncated} truncated")
        if self.num_empty_messages:
            parts.append(f"{self.num_empty_messages} with an empty question or answer")
        parts.append(
            f"{self.num_tokens} tokens, {self.num_supervised_tokens} supervised, longest {self.longest_row_tokens}"
        )
        return ", ".join(parts)


class ChatDataset(Dataset):
    """Rows as `{"tokens": list[int], "labels": list[int]}`, held as flat arrays.

    `labels[i]` is `tokens[i]` where that token is trained on, else torchtune's ignore index: not shifted yet.
    """

    def __init__(self, summary: DatasetSummary) -> None:
        self.summary = summary
        self._tokens = array("i")
        self._labels = array("i")
        self._ends = array("q", [0])

    def append(self, tokens: list[int], mask: list[bool]) -> None:
        self._tokens.extend(tokens)
        self._labels.extend(
            CROSS_ENTROPY_IGNORE_IDX if is_masked else token for token, is_masked in zip(tokens, mask, strict=True)
        )
        self._ends.append(len(self._tokens))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [end - start for start, end in zip(self._ends, self._ends[1:], strict=False)]

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        start, end = self._ends[index], self._ends[index + 1]
        return {"tokens": self._tokens[start:end].tolist(), "labels": self._labels[start:end].tolist()}


def chat_dataset(tokenizer: Llama2ChatTransform, source: str, split: str = "train") -> ChatDataset:
    """Read and tokenize a source of dialogs.

    Args:
        tokenizer: the transform; rows longer than its `max_seq_len` are cut, without a false EOS.
        source: a file or a data set's name on the hub, see :func:`read_rows`.
        split: of a data set on the hub.

    Raises:
        UserError: a source or row that cannot be read, by file and line; or no row with a token to train on.
    """
    rows = read_rows(source, split)
    first = next(rows, None)
    if first is None:
        raise UserError(f"dataset.source: {source!r} has no rows")
    try:
        format_name, converter = recognised_format(first.values.keys())
    except ValueError as error:
        raise UserError(f"{first.location}: {error}") from None
    dataset = ChatDataset(DatasetSummary(source, format_name))
    example = _append_rows(dataset, [first], converter, tokenizer)
    while chunk := list(islice(rows, _NUM_ROWS_PER_ENCODE)):
        _append_rows(dataset, chunk, converter, tokenizer)
    if not len(dataset):
        raise UserError(
            f"dataset.source: no row of {source!r} has a token to train on within max_seq_len "
            f"{tokenizer.max_seq_len}; the first is {example!r}"
        )
    return dataset


def _append_rows(dataset: ChatDataset, rows: list[Row], converter: RowConverter, tokenizer: Llama2ChatTransform) -> str:
    """Convert, tokenize, cut and count rows; returns the text of the first."""
    summary = dataset.summary
    dialogs = []
    for row in rows:
        try:
            dialog = converter(row.values)
            dialogs.append(dialog)
        except (ValueError, KeyError) as error:
            raise UserError(f"{row.location}: {error}") from None
        summary.num_rows += 1
        summary.num_empty_messages += any(not message.content for message in dialog)
    encoded: Iterator[tuple[list[int], list[bool]]] = iter(tokenizer.encode_dialogs(dialogs))
    text = ""
    for tokens, mask in encoded:
        text = text or tokenizer.decode(tokens)[:200]
        summary.num_truncated += tokenizer.max_seq_len is not None and len(tokens) > tokenizer.max_seq_len
        tokens, mask = tokens[: tokenizer.max_seq_len], mask[: tokenizer.max_seq_len]
        # The first token is never predicted, so it does not count as supervised.
        num_supervised = len(mask[1:]) - sum(mask[1:])
        if num_supervised == 0:
            summary.num_unsupervised += 1
            continue
        summary.num_kept += 1
        summary.num_tokens += len(tokens)
        summary.num_supervised_tokens += num_supervised
        summary.longest_row_tokens = max(summary.longest_row_tokens, len(tokens))
        dataset.append(tokens, mask)
    return text
