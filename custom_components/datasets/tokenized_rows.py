"""A data set ready to train on: rows of token ids, which of them are supervised, and what became of the rows."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Self, TypeVar

import numpy as np
from torch.utils.data import Dataset
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from custom_components.datasets.summary import DatasetSummary
from custom_components.runtime.errors import UserError

_MOST_ROWS = 2**31


class TokenizedRows(Dataset):
    """Holds rows of token ids as flat arrays. What a row is, and how it is given, is for subclasses to say.

    Args:
        tokens: the ids of all rows, end to end.
        is_supervised: which of them are trained on.
        ends: row i is `tokens[ends[i] : ends[i + 1]]`.
        rows: which of these rows the data set has, in its order.
        summaries: one for each source.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        is_supervised: np.ndarray,
        ends: np.ndarray,
        rows: np.ndarray,
        summaries: Sequence[DatasetSummary],
    ) -> None:
        self._tokens = tokens
        self._is_supervised = is_supervised
        self._ends = ends
        self._rows = rows
        self.summaries = list(summaries)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that hold the rows, by the names of the arguments."""
        return {"tokens": self._tokens, "is_supervised": self._is_supervised, "ends": self._ends}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return np.diff(self._ends)[self._rows].tolist()

    @property
    def sources(self) -> list[str]:
        """The name of each row's source."""
        # The arrays of a mix have the kept rows of its sources one after the other.
        source_ends = np.cumsum([summary.num_kept for summary in self.summaries])
        return [self.summaries[source].name for source in np.searchsorted(source_ends, self._rows, side="right")]

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, indices: Sequence[int]) -> Self:
        """Make a data set of some of the rows, which may repeat; the arrays are shared."""
        return type(self)(**self.arrays, rows=self._rows[indices], summaries=self.summaries)

    @property
    def digest(self) -> str:
        """A hash of all rows, in order."""
        contents = hashlib.sha256()
        for index in range(len(self)):
            contents.update(self.content_digest(index))
        return contents.hexdigest()

    def prompt_digest(self, index: int) -> bytes | None:
        """Hash what comes before a row's first supervised token; None if that is nothing but BOS."""
        row = self._row(index)
        num_tokens = int(self._is_supervised[row].argmax())
        return hashlib.sha256(self._tokens[row][:num_tokens].tobytes()).digest() if num_tokens > 1 else None

    def content_digest(self, index: int) -> bytes:
        """Hash a row's tokens and which of them are supervised; equal rows have equal hashes."""
        row = self._row(index)
        return row_digest(self._tokens[row], self._is_supervised[row])

    def _row(self, index: int) -> slice:
        return slice(*self._ends[self._rows[index] : self._rows[index] + 2])

    def _tokens_and_labels(self, row: slice) -> dict[str, list[int]]:
        labels = np.where(self._is_supervised[row], self._tokens[row], CROSS_ENTROPY_IGNORE_IDX)
        return {"tokens": self._tokens[row].tolist(), "labels": labels.tolist()}


class ChatDataset(TokenizedRows):
    """Gives rows as `{"tokens": list[int], "labels": list[int]}`.

    `labels[i]` is `tokens[i]` if that token is supervised, else torchtune's ignore index; labels are not shifted yet.
    """

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self._tokens_and_labels(self._row(index))


def row_digest(tokens: np.ndarray, is_supervised: np.ndarray) -> bytes:
    """Hash a row; see :meth:`TokenizedRows.content_digest`."""
    # note: hashes the inverse, torchtune's mask. Validation rows are drawn by this hash, and resumed runs check it.
    return hashlib.sha256(tokens.tobytes() + (~is_supervised).tobytes()).digest()


Rows = TypeVar("Rows", bound=TokenizedRows)


def split_validation(dataset: Rows, val_fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Split off about `val_fraction` of the rows, drawn by `seed`; returns the rows to train on and the others.

    Equal rows are drawn together, so that no validation row is trained on as another row.

    Raises:
        UserError: one of the two would be empty.
    """
    salt = seed.to_bytes(8, "little")
    draws = [
        int.from_bytes(hashlib.sha256(salt + dataset.content_digest(index)).digest()[:8], "little") / 2**64
        for index in range(len(dataset))
    ]
    # The rows of the lowest draws, not those under the fraction, so that small sets get their share too.
    threshold = sorted(draws)[min(len(draws) - 1, max(0, round(val_fraction * len(draws)) - 1))]
    validation = [index for index, draw in enumerate(draws) if draw <= threshold]
    training = [index for index, draw in enumerate(draws) if draw > threshold]
    if not training:
        raise UserError(f"val_fraction: {val_fraction} of {len(draws)} rows leaves nothing to train on; lower it")
    return dataset.rows(training), dataset.rows(validation)


def joined_arrays(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Join the arrays of several parts, those of the first part's rows first; of a single part nothing is copied.

    The arrays are taken out of the parts, so that of one name only there are two copies at a time.
    """
    if len(parts) == 1:
        return dict(parts[0])
    lengths = np.concatenate([np.diff(part.pop("ends")) for part in parts])
    joined = {name: np.concatenate([part.pop(name) for part in parts]) for name in [*parts[0]]}
    return joined | {"ends": np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])}


def mixed(parts: Sequence[tuple[Rows, float]]) -> Rows:
    """Join parts, each row as often as its part's weight; a fraction takes evenly spread rows."""
    rows, summaries, num_before = [], [], 0
    for part, weight in parts:
        num_taken = round(len(part) * weight)
        [summary] = part.summaries
        if not 0 < num_taken <= _MOST_ROWS:
            raise UserError(
                f"dataset.source: the weight {weight:g} of {summary.name!r} makes {num_taken} rows of {len(part)}; "
                f"{'lower it' if num_taken else 'raise it, or delete the source'}"
            )
        rows.append(num_before + (np.arange(num_taken) * len(part)) // num_taken % len(part))
        num_before += len(part)
        is_weighted = len(parts) > 1 or weight != 1
        summaries.append(replace(summary, weight=weight, num_taken=num_taken if is_weighted else None))
    first = parts[0][0]
    arrays = joined_arrays([part.arrays for part, _ in parts])
    return type(first)(**arrays, rows=np.concatenate(rows), summaries=summaries)
