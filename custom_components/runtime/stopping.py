"""Stopping a run from outside: finish the step, save, and leave."""

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
        """Leave the program as the signal asked, 128 + its number; to be called when all is saved."""
        if self.signal_number is not None:
            sys.exit(128 + self.signal_number)


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Take SIGINT and SIGTERM as requests for the time of the block. A second SIGINT stops at once."""
    request = StopRequest()

    def ask(signal_number: int, _frame: object) -> None:
        if request.signal_number is not None and signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal_number = signal_number
        # note: print could find stderr's buffer in use by what was interrupted.
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once, without saving\n")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
