"""The account of a source: how many rows, what became of them, what was not used."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from custom_components.datasets.row_messages import RowNotes
from custom_components.runtime.terminal import visible

# What tells apart two bad rows of one kind: quoted values, numbers, and all after a quote that is cut.
_VALUES = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\d+")
_CUT_VALUE = re.compile(r"['\"\[{(].*", re.DOTALL)
_MAX_KINDS = 8
_COUNTS = (
    *("num_rows", "num_kept", "num_bad", "num_overlong", "num_unsupervised", "num_truncated"),
    *("num_tokens", "num_supervised_tokens"),
)


@dataclass
class DatasetSummary:
    """Counts of what became of the rows of a source, as JSON values.

    Attributes:
        files: which of a folder's files are read and which are not.
        num_taken: rows of an epoch, if the source is one of several or has a weight.
        bad_rows: for each kind of bad row, how many there are, and the first with its place.
        notes: things that were left out or read in their own way, with `{s}` for their plural, and how often.
        unused_columns, unused_keys: columns of rows, and keys of messages, that have no part in training.
        foreign_marks: for each kind of dialog marks in text that is trained as prose, in how many, and the first.
    """

    source: str
    split: str = "train"
    files: str = ""
    weight: float = 1.0
    num_taken: int | None = None
    format: str = ""
    num_rows: int = 0
    num_kept: int = 0
    num_bad: int = 0
    num_overlong: int = 0
    num_unsupervised: int = 0
    num_truncated: int = 0
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    longest_row_tokens: int = 0
    bad_rows: dict[str, tuple[int, str]] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    unused_columns: list[str] = field(default_factory=list)
    unused_keys: list[str] = field(default_factory=list)
    foreign_marks: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, later: "DatasetSummary") -> None:
        """Add the counts of rows that come after these."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.longest_row_tokens = max(self.longest_row_tokens, later.longest_row_tokens)
        for note, count in later.notes.items():
            self.notes[note] = self.notes.get(note, 0) + count
        for kinds, more in ((self.bad_rows, later.bad_rows), (self.foreign_marks, later.foreign_marks)):
            for kind, (count, first) in more.items():
                num_before, first = kinds.get(kind, (0, first))
                kinds[kind] = (num_before + count, first)
        _add_names(self.unused_columns, later.unused_columns)
        _add_names(self.unused_keys, later.unused_keys)

    def count_bad_row(self, location: str, reason: str) -> None:
        kind = _CUT_VALUE.sub("", _VALUES.sub("", reason))
        self.num_bad += 1
        _count(self.bad_rows, kind, f"{location}: {reason}")

    def count_notes(self, location: str, notes: RowNotes) -> None:
        for note in notes.counted:
            self.notes[note] = self.notes.get(note, 0) + 1
        _add_names(self.unused_columns, notes.unused_columns)
        _add_names(self.unused_keys, notes.unused_keys)
        for mark in notes.foreign_marks:
            _count(self.foreign_marks, mark, location)

    def bad_row_lines(self) -> list[str]:
        """Give the first bad row of each kind with its place and reason, and how many there are like it."""
        lines = [
            first + (f" (and {counted(count - 1, 'more such row')})" if count > 1 else "")
            for count, first in self.bad_rows.values()
        ]
        more = f"and {len(lines) - _MAX_KINDS} more kinds of bad rows"
        return lines if len(lines) <= _MAX_KINDS else [*lines[:_MAX_KINDS], more]

    def losses(self) -> list[str]:
        """Name what rows were lost or changed by, each with its count."""
        counts = {
            "dropped (bad rows)": self.num_bad,
            "dropped (over max_seq_len)": self.num_overlong,
            "dropped (nothing to train on)": self.num_unsupervised,
            "truncated": self.num_truncated,
            **self.notes,
        }
        return [f"{count} {what.format(s='' if count == 1 else 's')}" for what, count in counts.items() if count]

    def __str__(self) -> str:
        counts = ", ".join(
            [
                f"{self.name} ({self.format}): {counted(self.num_rows, 'row')}, {self.num_kept} kept",
                *([] if self.num_taken is None else [f"{self.num_taken} taken (weight {self.weight:g})"]),
                *(["plain text, every token is trained"] if self.format == "text" else []),
                *self.losses(),
                f"{counted(self.num_tokens, 'token')}, {self.num_supervised_tokens} supervised",
                f"longest {self.longest_row_tokens}",
            ]
        )
        return visible("\n  ".join([counts, *(f"bad: {line}" for line in self.bad_row_lines()), *self._remarks()]))

    @property
    def name(self) -> str:
        """The source, with its split where that is not `train`."""
        return self.source if self.split == "train" else f"{self.source}, split {self.split}"

    def _remarks(self) -> Iterator[str]:
        if self.files:
            yield self.files
        for mark, (count, place) in self.foreign_marks.items():
            yield (
                f"warning: {mark!r} in {counted(count, 'text')}, the first {place}: marks of a dialog "
                "are trained as prose, prompts included; give such rows as messages, or with [INST] or ### Human: marks"
            )
        if self.unused_keys:
            yield f"keys of messages not used: {', '.join(self.unused_keys)}"
        if self.unused_columns:
            yield f"columns not used: {', '.join(self.unused_columns)}"


def account(summaries: Sequence[DatasetSummary]) -> str:
    """Say what became of the rows of each source, and of several how many rows an epoch has."""
    lines = [str(summary) for summary in summaries]
    if len(summaries) > 1:
        num_taken = [summary.num_kept if summary.num_taken is None else summary.num_taken for summary in summaries]
        lines.append(f"{len(summaries)} sources: {counted(sum(num_taken), 'row')}")
    return "\n".join(lines)


def counted(count: int, noun: str) -> str:
    """Write a number of things: `1 row`, `2 rows`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _add_names(names: list[str], found: Sequence[str]) -> None:
    names += [name for name in dict.fromkeys(found) if name not in names]


def _count(counts: dict[str, tuple[int, str]], kind: str, first: str) -> None:
    count, first = counts.get(kind, (0, first))
    counts[kind] = (count + 1, first)
