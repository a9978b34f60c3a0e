"""Text for a person at a terminal."""

import contextlib
import io
import os
import re
import select
import shutil
import sys
import textwrap

# All but tab and newline: a terminal would obey them.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    """Write control characters of a text from elsewhere as escapes, such as `\\x1b`."""
    return _CONTROLS.sub(lambda control: f"\\x{ord(control[0]):02x}", text)


def say(text: str) -> None:
    """Print text; on a terminal, a line that is wider than it is broken between words.

    Indented lines stay whole: they are commands to copy, or rows of a table.
    """
    if sys.stdout.isatty():
        num_columns = shutil.get_terminal_size().columns
        text = "\n".join(_broken(line, num_columns) for line in text.split("\n"))
    print(text)


def allow_any_text() -> None:
    """Write characters that an output's encoding does not have as escapes, such as `\\u27e6`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # note: fails where another kind of file has taken the stream's descriptor since the start.
            with contextlib.suppress(OSError):
                stream.reconfigure(errors="backslashreplace")


def can_print(text: str) -> bool:
    """Tell whether standard output's encoding has all characters of a text."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_stdout_closed() -> bool:
    """Tell whether nobody reads standard output any more; if so, the rest of it is thrown away."""
    try:
        sys.stdout.flush()
        is_closed = _has_no_reader(sys.stdout.fileno())
    except BrokenPipeError:
        is_closed = True
    except OSError:  # a stream without a descriptor
        is_closed = False
    if is_closed:
        # note: what is still in the buffer is written when the interpreter ends, and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_closed


def _has_no_reader(descriptor: int) -> bool:
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _broken(line: str, num_columns: int) -> str:
    if line.startswith(" "):
        return line
    return textwrap.fill(line, num_columns, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
