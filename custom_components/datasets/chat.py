"""A source of dialogs to a data set ready to train on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import PositiveInt

from custom_components.datasets.dialog_reader import DialogReader
from custom_components.datasets.dialog_rules import DialogRules, OnEmptyAnswer, OnUnevenTurns
from custom_components.datasets.row_formats import FORMATS
from custom_components.datasets.source_list import SourceName, WeightedSource
from custom_components.datasets.source_reader import SourceReader, laid_out, source_readers
from custom_components.datasets.summary import DatasetSummary
from custom_components.datasets.tokenized_rows import ChatDataset, mixed
from custom_components.runtime.errors import UserError
from custom_components.transforms.chat_transform import ChatTransform
from custom_components.transforms.turn_encoding import EncodedDialog


def chat_dataset(
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
    packed: bool = False,
) -> ChatDataset:
    """Read and tokenize a source of dialogs, or several.

    Args:
        tokenizer: the transform, with the prompt template and `max_seq_len`.
        source: a file, a folder or glob of them, or a data set's name on the hub, see :func:`find_source`; or a list of
            these, or of `{source, weight, ...}`, see :class:`WeightedSource`.
        split: of a folder or of a data set on the hub.
        subset, revision: of a data set on the hub.
        streaming: read a data set on the hub without downloading it whole, for those larger than the disk. Tokens are
            held in memory, 5 bytes each, so order, packing and resuming work as without.
        max_rows: read at most so many rows of each source.
        format: one of :mod:`row_formats`; None: recognised from the columns.
        column_map: the file's name for each of our columns that it names differently: `{prompt: question}`.
        system_prompt: for dialogs that have none of their own; None: the tokenizer's.
        on_overlong: what happens to rows over `max_seq_len`: "truncate" cuts them, without a false EOS.
        on_bad_row: "skip" drops and counts rows that cannot be read as a dialog; "error" names the first of each kind.
        on_uneven_turns, on_empty_answer: see :class:`DialogRules`.
        cache_dir: tokens of local files are kept here for later runs; None: they are not kept.
        packed: a key of torchtune's recipes; only False works. Our recipes have a `packed` of their own.

    Raises:
        UserError: a source or row cannot be read, named by file and line; or no row has a token to train on.
    """
    if packed:
        raise UserError("dataset.packed: true is not done by chat_dataset; wrap it in torchtune's PackedDataset")
    readers = source_readers(
        ChatReader,
        tokenizer,
        source,
        **{"split": split, "subset": subset, "revision": revision, "streaming": streaming, "max_rows": max_rows},
        **{"format": format, "column_map": column_map or {}, "system_prompt": system_prompt},
        **{"on_overlong": on_overlong, "on_bad_row": on_bad_row},
        **{"on_uneven_turns": on_uneven_turns, "on_empty_answer": on_empty_answer},
    )
    return mixed([(reader.cached(cache_dir), reader.settings.weight) for reader in readers])


def chat_readers(
    tokenizer: ChatTransform,
    source: SourceName | list[SourceName | WeightedSource],
    cache_dir: str | Path | None = None,
    column_map: dict[str, str] | None = None,
    packed: bool = False,
    **settings: Any,
) -> "list[ChatReader]":
    """Find the sources that :func:`chat_dataset` reads with the same arguments, to look at their rows one by one."""
    return source_readers(ChatReader, tokenizer, source, column_map=column_map or {}, **settings)


class ChatReader(SourceReader[ChatDataset]):
    """Reads rows that are one dialog each."""

    formats = FORMATS

    def row_reader(self, rules: DialogRules) -> DialogReader:
        return DialogReader(self.settings.format, self.settings.column_map, rules)

    def arrays(self, rows: Sequence[Sequence[EncodedDialog]]) -> dict[str, np.ndarray]:
        return laid_out([dialog for [dialog] in rows])

    def dataset(self, arrays: Mapping[str, np.ndarray], summary: DatasetSummary) -> ChatDataset:
        return ChatDataset(**arrays, rows=np.arange(len(arrays["ends"]) - 1), summaries=[summary])
