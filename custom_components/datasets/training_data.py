"""The rows of a training run, and the batches that they become."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from custom_components.datasets.batching import Batch, BatchPlan, collate
from custom_components.datasets.pair_batching import PairBatch, collate_pairs
from custom_components.datasets.pair_rows import PreferenceDataset
from custom_components.datasets.summary import account, counted
from custom_components.datasets.tokenized_rows import ChatDataset, TokenizedRows
from custom_components.transforms.chat_transform import ChatTransform

Rows = TypeVar("Rows", bound=TokenizedRows)


@dataclass(frozen=True)
class RowsOfRun(ABC, Generic[Rows]):
    """The rows that a run trains on and validates on.

    Attributes:
        validation: None if there are none.
        tokenizer: that made both.
    """

    train: Rows
    validation: Rows | None
    tokenizer: ChatTransform

    @abstractmethod
    def batch(self, dataset: Rows, rows: Sequence[int]) -> Batch:
        """Lay rows of one of the two data sets out in a forward."""

    @property
    def pack_capacity_tokens(self) -> int | None:
        """The tokens of a pack, where rows are packed."""
        return self.tokenizer.max_seq_len

    @property
    def lengths(self) -> Sequence[int]:
        """The tokens of each row to train on."""
        return self.train.lengths

    @property
    def has_validation(self) -> bool:
        return self.validation is not None

    @property
    def account(self) -> str:
        """What became of the rows of each source, and whether those to validate on are new to the run."""
        lines = [account(self.train.summaries)]
        if self.validation is not None:
            lines += _validation_lines(self.train, self.validation)
        return "\n".join(lines)

    def batches(self, forwards: Sequence[Sequence[int]]) -> list[Batch]:
        """Make the batch of each forward from the rows to train on."""
        return [self.batch(self.train, rows) for rows in forwards]

    def validation_batches(self, batch_size: int) -> list[Batch]:
        """Make the batches of a validation, in the order of the rows."""
        if self.validation is None:
            return []
        [*steps] = BatchPlan(batch_size, 1, shuffle=False, seed=0).steps(self.validation.lengths, epoch=0)
        return [self.batch(self.validation, rows) for [rows] in steps]


class Data(RowsOfRun[ChatDataset]):
    """Rows of supervised fine-tuning."""

    def batch(self, dataset: ChatDataset, rows: Sequence[int]) -> Batch:
        return collate([dataset[row] for row in rows])


class PairData(RowsOfRun[PreferenceDataset]):
    """Pairs of answers."""

    def batch(self, dataset: PreferenceDataset, rows: Sequence[int]) -> PairBatch:
        return collate_pairs([dataset[row] for row in rows])

    @property
    def pack_capacity_tokens(self) -> int | None:
        limit = self.tokenizer.max_seq_len  # of each of a pair's two dialogs
        return None if limit is None else 2 * limit


def _validation_lines(train: TokenizedRows, validation: TokenizedRows) -> Iterator[str]:
    num_rows = len(validation)
    if validation.arrays["tokens"] is train.arrays["tokens"]:
        yield f"{counted(num_rows, 'row')} {_are(num_rows)} kept for validation"
    else:
        yield f"validation: {account(validation.summaries)}"
    trained_rows = {train.content_digest(index) for index in range(len(train))}
    trained_prompts = {train.prompt_digest(index) for index in range(len(train))} - {None}
    new_rows = [index for index in range(num_rows) if validation.content_digest(index) not in trained_rows]
    num_asked = sum(validation.prompt_digest(index) in trained_prompts for index in new_rows)
    if num_known := num_rows - len(new_rows):
        known = f"{num_known} of the {num_rows} validation rows"
        yield f"{known} {_are(num_known)} also trained on: the loss is not that of new rows alone"
    if num_asked:
        have = "has" if num_asked == 1 else "have"
        yield f"{num_asked} of the {num_rows} validation rows {have} a prompt that is trained on with another answer"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"
