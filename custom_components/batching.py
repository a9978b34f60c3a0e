"""Which rows go into which forward, and how they lie in it.

The rows of a forward are laid end to end in one sequence, without padding. The order of the rows is a pure function of
seed and epoch, so that resuming has nothing to remember.

Dimensions: `T` tokens of all rows of a forward.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from custom_components.attention import RowLengths


@dataclass(frozen=True)
class Batch:
    """The rows of one forward, end to end.

    Attributes:
        tokens_1T: ids.
        labels_1T: the id that each position has to predict, or torchtune's ignore index: shifted, row by row.
        positions_1T: position in the row.
        rows: the rows' lengths, which stand for the attention mask.
    """

    tokens_1T: Tensor
    labels_1T: Tensor
    positions_1T: Tensor
    rows: RowLengths

    @property
    def num_tokens(self) -> int:
        return self.tokens_1T.numel()

    @property
    def num_supervised_tokens(self) -> int:
        return int((self.labels_1T != CROSS_ENTROPY_IGNORE_IDX).sum())

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.tokens_1T.to(device), self.labels_1T.to(device), self.positions_1T.to(device), self.rows)


def collate(rows: Sequence[dict[str, list[int]]]) -> Batch:
    """Lay rows of a :class:`ChatDataset` end to end.

    Labels are shifted inside each row, before the rows are joined: shifted afterwards, the last position of a row
    would have to predict the first token of the next.
    """
    tokens = [token for row in rows for token in row["tokens"]]
    labels = [label for row in rows for label in (*row["labels"][1:], CROSS_ENTROPY_IGNORE_IDX)]
    positions = [position for row in rows for position in range(len(row["tokens"]))]
    return Batch(
        torch.tensor([tokens]),
        torch.tensor([labels]),
        torch.tensor([positions]),
        RowLengths(tuple(len(row["tokens"]) for row in rows)),
    )


def row_order(num_rows: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """The order of the rows in an epoch, counted from 0."""
    if not shuffle:
        return list(range(num_rows))
    generator = torch.Generator().manual_seed(seed * 2**20 + epoch)
    return torch.randperm(num_rows, generator=generator).tolist()


def optimizer_steps(
    row_indices: Sequence[int], batch_size: int, gradient_accumulation_steps: int
) -> Iterator[list[list[int]]]:
    """An epoch's rows as optimizer steps, each a list of forwards, each a list of up to `batch_size` rows.

    The last step may be smaller; none is dropped.
    """
    forwards = [list(row_indices[start : start + batch_size]) for start in range(0, len(row_indices), batch_size)]
    for start in range(0, len(forwards), gradient_accumulation_steps):
        yield forwards[start : start + gradient_accumulation_steps]
