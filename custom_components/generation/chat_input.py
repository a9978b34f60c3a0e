"""Messages from a terminal or a pipe: line editing, pasted text, messages of several lines."""

import io
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TextIO

MARK = '"""'
_PROMPT, _CONTINUED_PROMPT = "> ", "... "


def messages_of(lines: TextIO, *, is_interactive: bool) -> Iterator[str]:
    """Yield message after message, without the space around it, until the end of the input; empty ones are left out.

    A message is a line, or what is between two marks of three quotes, or what is pasted into a terminal at once.

    Args:
        is_interactive: show a prompt before each line.
    """
    if isinstance(lines, io.TextIOWrapper):
        lines.reconfigure(errors="replace")  # what is not UTF-8 is no reason to end
    if is_interactive and sys.stdout.isatty():
        edit_lines()
    while (line := next_line(lines, _PROMPT if is_interactive else None)) is not None:
        message = line.strip()
        if message.startswith(MARK):
            parts = [message.removeprefix(MARK)]
            while not parts[-1].rstrip().endswith(MARK):
                line = next_line(lines, _CONTINUED_PROMPT if is_interactive else None)
                if line is None:
                    break
                parts.append(line.removesuffix("\n"))
            message = "\n".join(parts).rstrip().removesuffix(MARK).strip()
        if message:
            yield message


def next_line(lines: TextIO, prompt: str | None) -> str | None:
    """Read the next line; None at the end of the input.

    Args:
        prompt: shown before it, on the terminal even where the answers go to a file; None: nothing is shown.
    """
    if prompt is None:
        return lines.readline() or None
    if not sys.stdout.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
        return lines.readline() or None
    try:
        return input(prompt)
    except EOFError:
        print()
        return None


def edit_lines() -> ModuleType | None:
    """Let `input` edit its line and recall earlier ones, and take a paste with its line breaks as one line.

    Returns:
        Python's readline; None where it was built without.
    """
    try:
        import readline
    except ImportError:
        return None
    if "libedit" not in (readline.__doc__ or ""):  # macOS's, which knows no bracketed paste
        # note: Python 3.10 and later turn it off.
        readline.parse_and_bind("set enable-bracketed-paste on")
    readline.parse_and_bind("tab: self-insert")  # rather than complete Python's names
    return readline
