"""Rows to forwards: which rows share a forward, and how they are laid out in it.

The rows of a forward are joined end to end in one sequence, without padding. Their order is a pure function of seed and
epoch, so a checkpoint does not store it.

Dimensions: `T` tokens of all rows of a forward, `P` supervised positions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from custom_components.datasets.packing import grouped_by_length, pack_rows, row_order


@dataclass(frozen=True)
class Batch:
    """The rows of one forward, end to end.

    Attributes:
        tokens_1T: ids.
        labels_1T: the id to predict at each position, or torchtune's ignore index; shifted row by row.
        positions_1T: each token's position in its row.
        supervised_P: which of the T positions have a label. Found on the CPU, because on a GPU a sum or a selection by
            a boolean mask makes the host wait.
        row_lengths: the tokens of each row.
        boundaries: where rows begin and end, (num_rows + 1,), int32, for CUDA's attention; None on the CPU.
    """

    tokens_1T: Tensor
    labels_1T: Tensor
    positions_1T: Tensor
    supervised_P: Tensor
    row_lengths: tuple[int, ...]
    boundaries: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.tokens_1T.numel()

    @property
    def num_supervised_tokens(self) -> int:
        return self.supervised_P.numel()

    @property
    def num_units(self) -> int:
        """This batch's share of the number that a step's loss is divided by: its supervised tokens."""
        return self.num_supervised_tokens

    def to(self, device: torch.device) -> "Batch":
        boundaries = self.boundaries
        if device.type == "cuda":
            boundaries = torch.tensor([0, *accumulate(self.row_lengths)], dtype=torch.int32).to(device)
        return Batch(
            self.tokens_1T.to(device),
            self.labels_1T.to(device),
            self.positions_1T.to(device),
            self.supervised_P.to(device),
            self.row_lengths,
            boundaries,
        )


def collate(rows: Sequence[dict[str, list[int]]]) -> Batch:
    """Join rows of a :class:`ChatDataset` end to end.

    Labels are shifted inside each row, before the rows are joined; otherwise the last position of a row would have to
    predict the first token of the next.
    """
    tokens = [token for row in rows for token in row["tokens"]]
    labels = [label for row in rows for label in (*row["labels"][1:], CROSS_ENTROPY_IGNORE_IDX)]
    positions = [position for row in rows for position in range(len(row["tokens"]))]
    labels_1T = torch.tensor([labels])
    return Batch(
        torch.tensor([tokens]),
        labels_1T,
        torch.tensor([positions]),
        (labels_1T[0] != CROSS_ENTROPY_IGNORE_IDX).nonzero().squeeze(1),
        tuple(len(row["tokens"]) for row in rows),
    )


@dataclass(frozen=True)
class BatchPlan:
    """Says how rows become forwards and optimizer steps.

    Attributes:
        batch_size: rows of a forward; with `pack_capacity_tokens`, packs of a forward.
        gradient_accumulation_steps: forwards of an optimizer step.
        shuffle: another order each epoch.
        seed: of the order.
        pack_capacity_tokens: rows are joined into packs of up to this many tokens; None: they are not.
        group_by_length: rows of a forward are of similar length.
        max_steps_per_epoch: optimizer steps after which an epoch ends; None: all rows.
    """

    batch_size: int
    gradient_accumulation_steps: int
    shuffle: bool
    seed: int
    pack_capacity_tokens: int | None = None
    group_by_length: bool = False
    max_steps_per_epoch: int | None = None

    def steps(self, lengths: Sequence[int], epoch: int) -> list[list[list[int]]]:
        """List an epoch's optimizer steps, each a list of forwards, each a list of row indices.

        A pure function of the lengths and the epoch. Every row is in one step; the last step may be smaller.
        """
        return self._all_steps(lengths, epoch)[: self.max_steps_per_epoch]

    def run_steps(
        self, lengths: Sequence[int], epochs: float, max_steps: int | None
    ) -> list[tuple[int, list[list[int]]]]:
        """List all optimizer steps of a run, each with its epoch, counted from 0.

        Whichever of the three is reached first ends the run: `epochs`, whose fraction is that share of the last
        epoch's steps, rounded up; `max_steps_per_epoch` in each epoch; and `max_steps` in all.
        """
        steps: list[tuple[int, list[list[int]]]] = []
        for epoch in range(math.ceil(epochs)):
            if max_steps is not None and len(steps) >= max_steps:
                break
            all_steps = self._all_steps(lengths, epoch)
            num_steps = math.ceil(min(1.0, epochs - epoch) * len(all_steps) - _ROUNDING)
            steps += [(epoch, forwards) for forwards in all_steps[: max(1, num_steps)][: self.max_steps_per_epoch]]
        return steps[:max_steps]

    def _all_steps(self, lengths: Sequence[int], epoch: int) -> list[list[list[int]]]:
        if self.pack_capacity_tokens is not None:
            units = pack_rows(lengths, self.pack_capacity_tokens, self.seed, epoch, self.shuffle)
        else:
            order = row_order(len(lengths), self.seed, epoch, self.shuffle)
            if self.group_by_length:
                order = grouped_by_length(order, lengths, self.batch_size)
            units = [[index] for index in order]
        forwards = [[row for unit in some for row in unit] for some in _chunks(units, self.batch_size)]
        return _chunks(forwards, self.gradient_accumulation_steps)


# 1.1 - 1 is 0.10000000000000009: of 30 steps that is 3, not 4.
_ROUNDING = 1e-6
Item = TypeVar("Item")


def _chunks(items: Sequence[Item], size: int) -> list[list[Item]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]
