"""The table of a comparison of runs as text."""

import itertools
import textwrap
from collections.abc import Sequence

from custom_components.runs.comparison import TableRow

_NUM_COLUMNS = 80
_GAP = 2
# Longer labels and cells are broken into lines.
_WIDEST_LABEL = 24
_NARROWEST_CELL = 8
# Of so many runs all are beside each other.
_MOST_BESIDE = 4


def comparison_table(names: Sequence[str], rows: Sequence[TableRow]) -> str:
    """Tabulate runs side by side in at most 80 columns; as many runs under each other as do not fit beside each other.

    Args:
        names: of the runs, the heads of the columns.
    """
    label_width = min(_WIDEST_LABEL, max(len(row.label) for row in rows))
    columns = [[name, *(row.cells[index] for row in rows)] for index, name in enumerate(names)]
    widest = (_NUM_COLUMNS - label_width) // min(_MOST_BESIDE, len(names)) - _GAP
    widths = [min(widest, max(_NARROWEST_CELL, *map(len, column))) for column in columns]
    blocks = []
    for indices in _blocks(widths, _NUM_COLUMNS - label_width):
        lines = _lines("", [names[index] for index in indices], label_width, [widths[index] for index in indices])
        for row in rows:
            cells = [row.cells[index] for index in indices]
            lines += _lines(row.label, cells, label_width, [widths[index] for index in indices])
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _blocks(widths: Sequence[int], num_columns: int) -> list[list[int]]:
    """Divide columns into as few groups as fit, of about the same size."""
    blocks: list[list[int]] = [[]]
    for index, width in enumerate(widths):
        taken = sum(widths[other] + _GAP for other in blocks[-1])
        if blocks[-1] and taken + width + _GAP > num_columns:
            blocks.append([])
        blocks[-1].append(index)
    return blocks


def _lines(label: str, cells: Sequence[str], label_width: int, widths: Sequence[int]) -> list[str]:
    """Write a row, its cells broken where they are wider than their columns."""
    parts = [_broken(text, width) for text, width in zip([label, *cells], [label_width, *widths], strict=True)]
    lines = []
    for line in itertools.zip_longest(*parts, fillvalue=""):
        padded = [text.rjust(width + _GAP) for text, width in zip(line[1:], widths, strict=True)]
        lines.append((line[0].ljust(label_width) + "".join(padded)).rstrip())
    return lines


def _broken(text: str, width: int) -> list[str]:
    indent = " " * (len(text) - len(text.lstrip()))
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False) or [""]
