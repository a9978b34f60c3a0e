"""Reading text files of others: their size and kind are looked at first."""

import errno
import stat
from pathlib import Path

# The largest tokenizer.json has 35 MB.
MOST_BYTES = 256 * 2**20


def read_text(path: Path, most_bytes: int = MOST_BYTES) -> str:
    """Read a file of UTF-8 text.

    Raises:
        OSError: it cannot be read, is larger than `most_bytes`, or is not a file: a pipe would be waited for.
        UnicodeDecodeError: it is not UTF-8.
    """
    check_is_file(path, most_bytes)
    return path.read_text(encoding="utf-8")


def check_is_file(path: Path, most_bytes: int | None = None) -> None:
    """Look at what is at a path.

    Raises:
        OSError: it is not a file, or it is too large.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    if most_bytes is not None and status.st_size > most_bytes:
        raise OSError(errno.EFBIG, f"its {status.st_size} bytes are more than such a file has", str(path))
