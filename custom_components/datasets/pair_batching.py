"""Pairs to forwards: the two dialogs of each pair end to end, and which answer each supervised position is of.

Dimensions: `N` pairs, 2 dialogs of each, first the chosen one; `P` supervised positions; `T` tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from custom_components.datasets.batching import Batch, collate


@dataclass(frozen=True, kw_only=True)
class PairBatch(Batch):
    """The pairs of one forward: chosen, rejected, chosen, rejected, ...

    Attributes:
        answers_P: the dialog that each supervised position is of, by its place in the forward.
        num_tokens_N2: the supervised tokens of each dialog.
        reference_N2: log-probabilities of the answers under the reference model; zero where they are not known.
    """

    answers_P: Tensor
    num_tokens_N2: Tensor
    reference_N2: Tensor

    @property
    def num_units(self) -> int:
        """The pairs: a step's loss is divided by those of all its forwards."""
        return len(self.num_tokens_N2)

    def to(self, device: torch.device) -> "PairBatch":
        return PairBatch(
            **vars(super().to(device)),
            answers_P=self.answers_P.to(device),
            num_tokens_N2=self.num_tokens_N2.to(device),
            reference_N2=self.reference_N2.to(device),
        )


def collate_pairs(pairs: Sequence[dict[str, Any]]) -> PairBatch:
    """Join the dialogs of pairs, of a :class:`PreferenceDataset`, end to end."""
    batch = collate([pair[name] for pair in pairs for name in ("chosen", "rejected")])
    lengths = torch.tensor(batch.row_lengths)
    answers_P = torch.repeat_interleave(lengths)[batch.supervised_P]
    return PairBatch(
        **vars(batch),
        answers_P=answers_P,
        num_tokens_N2=torch.bincount(answers_P, minlength=len(lengths)).view(-1, 2),
        reference_N2=torch.tensor([pair.get("reference", (0.0, 0.0)) for pair in pairs], dtype=torch.float64),
    )
