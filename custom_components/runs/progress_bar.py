"""The progress of a run: a bar on a terminal, plain lines anywhere else."""

import sys
import time
from typing import TextIO

from tqdm import tqdm

from custom_components.runtime.terminal import fitted, say_if_read

# A line in a log file at most this often, and at most once for this share of the steps.
_LINE_INTERVAL_SECONDS = 10.0
_LINE_INTERVAL_SHARE = 0.01


class ProgressBar:
    """Shows how far a run is. Off a terminal it prints a line every 10 seconds, at most 100 in a run.

    Args:
        num_steps: of the whole run.
        num_done_steps: of those, the steps that an earlier process took.
        stream: a bar is drawn if this is a terminal.
    """

    def __init__(self, num_steps: int, num_done_steps: int, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._num_steps = num_steps
        self._first_step = self._line_step = num_done_steps
        self._start_seconds = self._line_seconds = time.monotonic()
        self._bar: tqdm | None = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=num_steps,
                initial=num_done_steps,
                unit="step",
                desc="training",
                dynamic_ncols=True,
                file=self._stream,
            )

    def update(self, step: int, loss: float) -> None:
        """Show that `step` is done."""
        if self._bar is not None:
            self._bar.update()
            self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            return
        now = time.monotonic()
        is_due = (
            now - self._line_seconds >= _LINE_INTERVAL_SECONDS
            and step - self._line_step >= _LINE_INTERVAL_SHARE * self._num_steps
        )
        if is_due or step == self._num_steps or step == self._first_step + 1:
            self._line_step, self._line_seconds = step, now
            seconds_per_step = (now - self._start_seconds) / (step - self._first_step)
            left = _duration((self._num_steps - step) * seconds_per_step)
            say_if_read(
                f"step {step}/{self._num_steps}, loss {loss:.3f}, {seconds_per_step:.2f} s/step, {left} left",
                self._stream,
            )

    def say(self, text: str) -> None:
        """Print a line of its own; a bar is drawn again below it."""
        if self._bar is not None:
            self._bar.write(fitted(text, self._stream), file=self._stream)
        else:
            say_if_read(text, self._stream)

    def close(self) -> None:
        """End the bar's line, so that what is printed next begins its own."""
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    """Write a duration as `45 s`, `12 min` or `3.4 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
