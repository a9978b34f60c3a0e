"""A disk that takes no more, however the library that writes to it says so."""

import contextlib
import errno
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from custom_components.runtime.errors import UserError

_WORDS = {
    errno.ENOSPC: "the disk of {} is full",
    errno.EDQUOT: "the disk quota of {} is used up",
    errno.EROFS: "the disk of {} is read-only",
    errno.EFBIG: "the disk of {} takes no file as large",
}
# As Rust's libraries end their messages, safetensors and tokenizers among them.
_RUST_NUMBER = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def disk_errors_of(key: str, path: Path, advice: str) -> Iterator[None]:
    """Say in one line that the disk of `path` takes no more, if that is why the block failed.

    Args:
        key: of the config, that names the path.
        advice: what to do.

    Raises:
        UserError: the disk is full, or read-only.
    """
    try:
        yield
    except Exception as error:
        words = _WORDS.get(error_number(error) or 0)
        if words is None:
            raise
        raise UserError(f"{key}: {words.format(repr(str(path)))}; {advice}") from None


def error_number(error: BaseException) -> int | None:
    """The system's number of an error, also where a library put it into words; None: it has none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if isinstance(error, OSError) and re.search(r"requested and \d+ written", str(error)):
        return errno.ENOSPC  # numpy, which writes with C's fwrite
    match = _RUST_NUMBER.search(str(error))
    return int(match[1]) if match else None


class RememberingFile:
    """A file to write to that keeps what went wrong: torch.save says only that a position is not the expected one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()
