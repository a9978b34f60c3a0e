"""A terminal of a certain width, of which is kept what is printed to it."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import termios
import threading

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours, cursor moves: ECMA-48, section 5.4


class Terminal:
    """A pseudo-terminal. Programs print to `descriptor`.

    Args:
        num_columns: of its width.
    """

    def __init__(self, num_columns: int = 80) -> None:
        self._screen, self.descriptor = pty.openpty()
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 24, num_columns, 0, 0))
        self._printed = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # nobody has it open any more
            while chunk := os.read(self._screen, 1 << 16):
                self._printed += chunk

    def text(self) -> str:
        """Close it and give what was printed, without colours. To be called when the program has ended."""
        os.close(self.descriptor)
        self._reader.join()
        os.close(self._screen)
        return _CONTROL.sub("", self._printed.decode()).replace("\r\n", "\n")
