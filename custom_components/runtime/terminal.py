"""Text for a person at a terminal."""

import contextlib
import io
import os
import re
import select
import stat
import sys
import textwrap
from typing import TextIO

_NUM_COLUMNS = 80  # of a terminal that does not say
# All but tab and newline: a terminal would obey them.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    """Write control characters of a text from elsewhere as escapes, such as `\\x1b`."""
    return _CONTROLS.sub(lambda control: f"\\x{ord(control[0]):02x}", text)


def say(text: str, stream: TextIO | None = None) -> None:
    """Print text at once, by default to stdout, as :func:`fitted` breaks it."""
    stream = stream or sys.stdout
    print(fitted(text, stream), file=stream, flush=True)


def say_if_read(text: str, stream: TextIO) -> None:
    """Print text; where nobody reads it any more it is lost, and what comes after it.

    Ctrl-C in `tune run ... 2>&1 | tee log` ends tee, while the run has still to save.
    """
    try:
        say(text, stream)
    except BrokenPipeError:
        _send_to_nowhere(stream.fileno())


def fitted(text: str, stream: TextIO) -> str:
    """Break lines that are wider than a terminal between words; elsewhere each stays one line, for programs.

    Indented lines stay whole: they are commands to copy, or rows of a table.
    """
    if not stream.isatty():
        return text
    num_columns = _num_columns(stream)
    return "\n".join(_broken(line, num_columns) for line in text.split("\n"))


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


def leave_closed_terminal() -> None:
    """Send what is printed to nowhere, where it went to a terminal: writing to one that was closed is an error."""
    for descriptor in (1, 2):
        # note: a closed terminal no longer counts as a terminal, but is still a device.
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            _send_to_nowhere(descriptor)


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
        _send_to_nowhere(sys.stdout.fileno())
    return is_closed


def _send_to_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _has_no_reader(descriptor: int) -> bool:
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _num_columns(stream: TextIO) -> int:
    # note: not shutil's, which looks at stdout whatever is written to, and stdout may be a file.
    try:
        return os.get_terminal_size(stream.fileno()).columns or _NUM_COLUMNS
    except OSError:
        return _NUM_COLUMNS


def _broken(line: str, num_columns: int) -> str:
    if line.startswith(" ") or len(line) <= num_columns:
        return line
    return textwrap.fill(line, num_columns, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
