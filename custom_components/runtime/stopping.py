"""Stopping a run from outside: finish the step, save, and exit."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator


class StopRequest:
    """Remembers the signal that asked the run to stop."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    @property
    def is_asked(self) -> bool:
        return self.signal_number is not None

    def leave_if_asked(self) -> None:
        """Exit as the signal asked, with 128 + its number; call it when all is saved."""
        if self.signal_number is not None:
            sys.exit(128 + self.signal_number)


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside the block, SIGINT and SIGTERM ask the run to stop after this step; a second SIGINT stops at once."""
    request = StopRequest()

    def ask(signal_number: int, _frame: object) -> None:
        if request.signal_number is not None and signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal_number = signal_number
        # note: not print: the interrupted code may be using stderr's buffer.
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once, without saving\n")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
