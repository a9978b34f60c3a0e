"""Stopping a run by a signal, and saving by the clock. The loop checks both between two steps."""

import contextlib
import os
import signal
import time
from collections.abc import Collection, Iterator

from custom_components.runtime.terminal import leave_closed_terminal

# SIGHUP: the terminal was closed. SIGUSR1: SLURM's `--signal=USR1@90`, 90 seconds before the time limit.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_WORDS = b"\nstopping after this step; Ctrl-C again stops at once, without saving\n"


class StopRequest:
    """Remembers the signal that asked the run to stop."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    @property
    def is_asked(self) -> bool:
        return self.signal_number is not None


@contextlib.contextmanager
def stop_requests(answered: Collection[int] = STOP_SIGNALS) -> Iterator[StopRequest]:
    """Inside the block, `STOP_SIGNALS` ask the run to stop after this step. A second SIGINT stops at once.

    A signal that is ignored, as SIGHUP is under nohup, stays ignored.

    Args:
        answered: the signals on which a line says so.
    """
    request = StopRequest()

    def ask(signal_number: int, _frame: object) -> None:
        if request.signal_number is not None and signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal_number = signal_number
        if signal_number == signal.SIGHUP:
            leave_closed_terminal()
        # note: print could find stderr's buffer in use by what was interrupted.
        if signal_number in answered:
            with contextlib.suppress(OSError):
                os.write(2, _WORDS)

    taken = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in taken}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class SaveClock:
    """Asks for a save every so many minutes.

    Args:
        minutes: since the last save; None: never.
    """

    def __init__(self, minutes: float | None) -> None:
        self._seconds = None if minutes is None else 60 * minutes
        self.restart()

    def restart(self) -> None:
        """Count from now on: something was saved."""
        self._start_seconds = time.monotonic()

    @property
    def is_due(self) -> bool:
        return self._seconds is not None and time.monotonic() - self._start_seconds >= self._seconds
