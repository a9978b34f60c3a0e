"""Records of a source to tokens, a chunk at a time, each chunk with its own account."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np

from custom_components.datasets.file_readers import BadRow, Row
from custom_components.datasets.row_messages import RowNotes
from custom_components.datasets.source_list import WeightedSource
from custom_components.datasets.summary import DatasetSummary
from custom_components.transforms.chat_transform import ChatTransform
from custom_components.transforms.dialogs import ChatMessage
from custom_components.transforms.turn_encoding import EncodedDialog
from custom_components.transforms.turns import Turn

_SPLIT = "row{s} with a token split between prompt and answer, as when the prompt waits for the answer"


class RowReader(Protocol):
    """Reads the rows of one source, in the format of the first row that has one."""

    @property
    def format_found(self) -> str:
        """The name of that format; empty before it is known."""

    def dialogs(self, row: Row) -> tuple[Sequence[Sequence[ChatMessage]], RowNotes]:
        """Give the dialogs of a row, none if nothing of it is to be trained, and what there is to say of it.

        Raises:
            ValueError: the row is bad.
        """


@dataclass(frozen=True)
class TokenizedChunk:
    """What became of a chunk of records.

    Attributes:
        arrays: the rows that are trained on, as :attr:`TokenizedRows.arrays`; empty if there are none.
        summary: the counts of these records alone.
        first_text: how the first row begins, kept or not.
        refusal: why the chunk stops the run; "": it does not.
    """

    arrays: dict[str, np.ndarray]
    summary: DatasetSummary
    first_text: str
    refusal: str


@dataclass(frozen=True)
class RowTokenizer:
    """Turns records of one source into tokens as its settings say, in order: the first of them decide the format.

    Attributes:
        layout: lays out the rows that are kept, none of them over `max_seq_len`, end to end.
        loss: says why a row that could be trained on is left out, in the words of the account; None: it is not.
    """

    tokenizer: ChatTransform
    settings: WeightedSource
    rows: RowReader
    layout: Callable[[Sequence[Sequence[EncodedDialog]]], dict[str, np.ndarray]]
    loss: Callable[[Sequence[EncodedDialog]], str | None]

    def tokenized(self, records: Sequence[Row | BadRow], *, is_refused: bool = False) -> TokenizedChunk:
        """Tokenize records and count what becomes of them.

        Args:
            is_refused: a bad row before these is an error: they are read only to name every kind of bad row at once.
        """
        summary = DatasetSummary("")
        locations: list[str] = []
        rendered: list[list[list[Turn]]] = []
        for record in records:
            row = self._rendered(record, summary)
            if row and not (is_refused or self.refuses(summary)):
                locations.append(location_of(record))
                rendered.append(row)
        encoded = iter(self.tokenizer.encode_turns([turns for row in rendered for turns in row]))
        kept, first_text, refusal = [], "", ""
        for location, turns_of_row in zip(locations, rendered, strict=True):
            dialogs = list(islice(encoded, len(turns_of_row)))
            first_text = first_text or self.tokenizer.decode(dialogs[0].tokens)[:200]
            if refusal := self._refusal(dialogs, location):
                break
            if self._keeps(dialogs, summary):
                if any(map(self.tokenizer.splits_a_token, turns_of_row)):
                    summary.notes[_SPLIT] = summary.notes.get(_SPLIT, 0) + 1
                kept.append([self._cut(dialog) for dialog in dialogs])
        summary.num_kept = len(kept)
        return TokenizedChunk(self.layout(kept) if kept else {}, summary, first_text, refusal)

    def refuses(self, summary: DatasetSummary) -> bool:
        """Tell whether a bad row is an error, and there is one."""
        return self.settings.on_bad_row == "error" and summary.num_bad > 0

    def _rendered(self, record: Row | BadRow, summary: DatasetSummary) -> list[list[Turn]]:
        """Render a record's dialogs; gives none if nothing of it is trained on."""
        summary.num_rows += 1
        if isinstance(record, BadRow):
            summary.count_bad_row(location_of(record), str(record).partition(": ")[2])
            return []
        try:
            dialogs, notes = self.rows.dialogs(record)
            rendered = [self.tokenizer.render(dialog) for dialog in dialogs]
        except ValueError as error:
            summary.count_bad_row(record.location, str(error))
            return []
        summary.count_notes(record.location, notes)
        return rendered

    def _cut(self, dialog: EncodedDialog) -> EncodedDialog:
        cut = self.tokenizer.max_seq_len
        return EncodedDialog(dialog.tokens[:cut], dialog.is_supervised[:cut])

    def _refusal(self, dialogs: Sequence[EncodedDialog], location: str) -> str:
        if self.settings.on_overlong != "error":
            return ""
        limit = self.tokenizer.max_seq_len
        for tokens, _ in dialogs:
            if limit is not None and len(tokens) > limit:
                text = self.tokenizer.decode(tokens)[:60]
                return f"{location}: has {len(tokens)} tokens, max_seq_len is {limit}: {text!r}"
        return ""

    def _keeps(self, dialogs: Sequence[EncodedDialog], summary: DatasetSummary) -> bool:
        """Decide whether a row is trained on, and count it."""
        cut = self.tokenizer.max_seq_len
        is_overlong = any(cut is not None and len(dialog.tokens) > cut for dialog in dialogs)
        if is_overlong and self.settings.on_overlong == "drop":
            summary.num_overlong += 1
            return False
        # The first token is never predicted, so it does not count as supervised.
        nums_supervised = [sum(dialog.is_supervised[1:cut]) for dialog in dialogs]
        if not all(nums_supervised):
            summary.num_unsupervised += 1
            return False
        if (reason := self.loss(dialogs)) is not None:
            summary.notes[reason] = summary.notes.get(reason, 0) + 1
            return False
        nums_tokens = [len(dialog.tokens[:cut]) for dialog in dialogs]
        summary.num_truncated += is_overlong
        summary.num_tokens += sum(nums_tokens)
        summary.num_supervised_tokens += sum(nums_supervised)
        summary.longest_row_tokens = max(summary.longest_row_tokens, *nums_tokens)
        return True


def location_of(record: Row | BadRow) -> str:
    """Say where a record is, such as `train.jsonl:17`."""
    return record.location if isinstance(record, Row) else str(record).partition(": ")[0]
