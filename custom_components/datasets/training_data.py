"""The rows of a training run, and the batches that they become."""

from collections.abc import Sequence
from dataclasses import dataclass

from custom_components.datasets.batching import Batch, BatchPlan, collate
from custom_components.datasets.tokenized_rows import ChatDataset
from custom_components.transforms.llama2_chat import Llama2ChatTransform


@dataclass(frozen=True)
class Data:
    """The rows that a run trains on and validates on.

    Attributes:
        validation: None if there are none.
        tokenizer: that made both.
    """

    train: ChatDataset
    validation: ChatDataset | None
    tokenizer: Llama2ChatTransform

    def batches(self, forwards: Sequence[Sequence[int]]) -> list[Batch]:
        """Make the batch of each forward from the rows to train on."""
        return [collate([self.train[row] for row in rows]) for rows in forwards]

    def validation_batches(self, batch_size: int) -> list[Batch]:
        """Make the batches of a validation, in the order of the rows."""
        if self.validation is None:
            return []
        [*steps] = BatchPlan(batch_size, 1, shuffle=False, seed=0).steps(self.validation.lengths, epoch=0)
        return [collate([self.validation[row] for row in rows]) for [rows] in steps]
