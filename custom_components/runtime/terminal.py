"""Text for a person at a terminal."""

import shutil
import sys
import textwrap


def say(text: str) -> None:
    """Print text; on a terminal, a line that is wider than it is broken between words.

    Indented lines stay whole: they are commands to copy, or rows of a table.
    """
    if sys.stdout.isatty():
        num_columns = shutil.get_terminal_size().columns
        text = "\n".join(_broken(line, num_columns) for line in text.split("\n"))
    print(text)


def _broken(line: str, num_columns: int) -> str:
    if line.startswith(" "):
        return line
    return textwrap.fill(line, num_columns, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
