"""A source of pairs of answers to a data set ready to learn preferences from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import PositiveInt

from custom_components.datasets.dialog_rules import DialogRules, OnEmptyAnswer, OnUnevenTurns
from custom_components.datasets.pair_formats import EQUAL_ANSWERS, PAIR_FORMATS, PairReader
from custom_components.datasets.pair_rows import PreferenceDataset
from custom_components.datasets.source_list import SourceName, WeightedSource
from custom_components.datasets.source_reader import SourceReader, laid_out, source_readers
from custom_components.datasets.summary import DatasetSummary
from custom_components.datasets.tokenized_rows import mixed
from custom_components.transforms.chat_transform import ChatTransform
from custom_components.transforms.turn_encoding import EncodedDialog


def preference_dataset(
    tokenizer: ChatTransform,
    source: SourceName | list[SourceName | WeightedSource],
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    max_rows: PositiveInt | None = None,
    format: str | None = None,
    column_map: dict[str, str] | None = None,
    system_prompt: str | None = None,
    on_overlong: Literal["truncate", "drop", "error"] = "truncate",
    on_bad_row: Literal["error", "skip"] = "error",
    on_uneven_turns: OnUnevenTurns = "error",
    on_empty_answer: OnEmptyAnswer = "drop",
    cache_dir: str | Path | None = None,
) -> PreferenceDataset:
    """Read and tokenize a source of pairs, or several. A pair is two answers to one question, the better one first.

    The arguments are those of :func:`chat_dataset`, where they do not differ here.

    Args:
        format: one of :mod:`pair_formats`; None: recognised from the columns.
        on_overlong: what happens to pairs with a dialog over `max_seq_len`; "truncate" cuts each dialog by itself.
        on_empty_answer: "drop" drops pairs with an empty answer.

    Raises:
        UserError: a source or row cannot be read, named by file and line; or no pair has a token to train on.
    """
    readers = source_readers(
        PairsReader,
        tokenizer,
        source,
        **{"split": split, "subset": subset, "revision": revision, "streaming": streaming, "max_rows": max_rows},
        **{"format": format, "column_map": column_map or {}, "system_prompt": system_prompt},
        **{"on_overlong": on_overlong, "on_bad_row": on_bad_row},
        **{"on_uneven_turns": on_uneven_turns, "on_empty_answer": on_empty_answer},
    )
    return mixed([(reader.cached(cache_dir), reader.settings.weight) for reader in readers])


def preference_readers(
    tokenizer: ChatTransform,
    source: SourceName | list[SourceName | WeightedSource],
    cache_dir: str | Path | None = None,
    column_map: dict[str, str] | None = None,
    **settings: Any,
) -> "list[PairsReader]":
    """Find the sources that :func:`preference_dataset` reads with the same arguments, to look at their rows."""
    return source_readers(PairsReader, tokenizer, source, column_map=column_map or {}, **settings)


class PairsReader(SourceReader[PreferenceDataset]):
    """Reads rows that are two dialogs each, chosen and rejected."""

    formats = PAIR_FORMATS
    kind = ("pairs",)

    def row_reader(self, rules: DialogRules) -> PairReader:
        return PairReader(self.settings.format, self.settings.column_map, rules)

    def loss(self, row: Sequence[EncodedDialog]) -> str | None:
        """Leave out pairs that cutting has made equal, or that differ only in white space that no token has."""
        cut = self.tokenizer.max_seq_len
        chosen, rejected = ((dialog.tokens[:cut], dialog.is_supervised[:cut]) for dialog in row)
        return EQUAL_ANSWERS if chosen == rejected else None

    def arrays(self, rows: Sequence[Sequence[EncodedDialog]]) -> dict[str, np.ndarray]:
        dialogs = laid_out([dialog for pair in rows for dialog in pair])
        chosen_lengths = np.array([len(chosen.tokens) for chosen, _ in rows], np.int64)
        return {**dialogs, "ends": dialogs["ends"][::2], "chosen_lengths": chosen_lengths}

    def dataset(self, arrays: Mapping[str, np.ndarray], summary: DatasetSummary) -> PreferenceDataset:
        return PreferenceDataset(**arrays, rows=np.arange(len(arrays["ends"]) - 1), summaries=[summary])
