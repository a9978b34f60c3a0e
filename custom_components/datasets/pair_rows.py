"""Rows of pairs: the tokens of two dialogs, chosen and rejected, and how a reference model rates them."""

import hashlib
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from custom_components.datasets.summary import DatasetSummary
from custom_components.datasets.tokenized_rows import TokenizedRows


class PreferenceDataset(TokenizedRows):
    """Gives pairs as `{"chosen", "rejected"}`, each as :class:`ChatDataset` gives a row.

    Args:
        tokens, is_supervised, ends, rows, summaries: see :class:`TokenizedRows`; a row is the tokens of the chosen
            dialog and then those of the rejected one, so a row's length is that of both.
        chosen_lengths: the tokens of each row's chosen dialog.
        reference: the reference model's log-probabilities of the answers in nats, (pairs, 2), chosen and rejected, in
            the order of `rows`. With it a pair has a third entry, `"reference"`. None: not known, or not needed.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        is_supervised: np.ndarray,
        ends: np.ndarray,
        chosen_lengths: np.ndarray,
        rows: np.ndarray,
        summaries: Sequence[DatasetSummary],
        reference: np.ndarray | None = None,
    ) -> None:
        super().__init__(tokens, is_supervised, ends, rows, summaries)
        self._chosen_lengths = chosen_lengths
        self._reference = reference

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {**super().arrays, "chosen_lengths": self._chosen_lengths}

    def rows(self, indices: Sequence[int]) -> Self:
        assert self._reference is None, "its order is that of the rows"
        return super().rows(indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._row(index)
        split = row.start + int(self._chosen_lengths[self._rows[index]])
        pair: dict[str, Any] = {
            "chosen": self._tokens_and_labels(slice(row.start, split)),
            "rejected": self._tokens_and_labels(slice(split, row.stop)),
        }
        if self._reference is not None:
            pair["reference"] = self._reference[index].tolist()
        return pair

    def content_digest(self, index: int) -> bytes:
        length = int(self._chosen_lengths[self._rows[index]])
        return hashlib.sha256(super().content_digest(index) + length.to_bytes(8, "little")).digest()

    def distinct(self) -> tuple[Self, np.ndarray]:
        """Give each row once, and for each row of this data set its index there; weights make rows repeat."""
        _, first, inverse = np.unique(self._rows, return_index=True, return_inverse=True)
        return self.rows(first.tolist()), inverse

    def with_reference(self, reference: np.ndarray) -> Self:
        """Give the same pairs with the reference model's log-probabilities, (pairs, 2)."""
        assert reference.shape == (len(self), 2), (reference.shape, len(self))
        return type(self)(**self.arrays, rows=self._rows, summaries=self.summaries, reference=reference)
