"""A preview as text, for terminals with colours, files, and encodings with few characters."""

import sys
from dataclasses import dataclass

from custom_components.datasets.row_preview import ShownRow, Span
from custom_components.runtime.terminal import can_print


@dataclass(frozen=True)
class Marks:
    """What is written around supervised text, and around the name of a control token instead of its `<` and `>`."""

    supervised: tuple[str, str]
    control: tuple[str, str]


COLOURS = Marks(("\033[32m", "\033[0m"), ("\033[7m<", ">\033[27m"))  # green, reversed
BRACKETS = Marks(("\u27e6", "\u27e7"), ("\u27e8", "\u27e9"))  # white square brackets, angle brackets
ASCII_BRACKETS = Marks(("[[", "]]"), ("{", "}"))


def marks_of_stdout() -> Marks:
    """Choose the marks that standard output can show."""
    if sys.stdout.isatty():
        return COLOURS
    return BRACKETS if can_print("".join([*BRACKETS.supervised, *BRACKETS.control])) else ASCII_BRACKETS


def row_text(row: ShownRow, marks: Marks) -> str:
    """Write a row with a line above it that names it and says what becomes of it."""
    lines = [f"---- {row.name}: {row.fate}"]
    if text := spans_text(row.spans, marks) or row.record:
        lines.append(text)
    for line in row.tokens:
        text = _control(line.span, marks) if line.span.is_control else repr(line.span.text)
        trained = "trained" if line.span.is_supervised else ""
        lines.append(f"{line.position:>6} {line.token:>6}  {text:<24} {trained}".rstrip())
    return "\n".join(lines)


def spans_text(spans: tuple[Span, ...], marks: Marks) -> str:
    """Write a row's text with marks around what is supervised."""
    parts, is_supervised = [], False
    for span in spans:
        if span.is_supervised != is_supervised:
            parts.append(marks.supervised[0 if span.is_supervised else 1])
            is_supervised = span.is_supervised
        parts.append(_control(span, marks) if span.is_control else span.text)
    return "".join([*parts, marks.supervised[1] if is_supervised else ""])


def _control(span: Span, marks: Marks) -> str:
    opening, closing = marks.control
    return f"{opening}{span.text.removeprefix('<').removesuffix('>')}{closing}"
