"""The progress of a run on a terminal and in a file."""

import io
import re
import signal
import sys

import pytest
from tqdm import tqdm

from custom_components.runs import progress_bar
from custom_components.runs.progress_bar import ProgressBar
from custom_components.runtime.errors import UserError, run_recipe


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when a test says so."""
    seconds = [0.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: seconds[0])
    return seconds


def lines_of_run(clock, num_steps, seconds_per_step, num_done_steps=0):
    stream = io.StringIO()
    bar = ProgressBar(num_steps, num_done_steps, stream)
    for step in range(num_done_steps + 1, num_steps + 1):
        clock[0] += seconds_per_step
        bar.update(step, loss=1.5)
    bar.close()
    assert "\r" not in stream.getvalue()
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("seconds_per_step", [0.01, 1, 40])
def test_off_a_terminal_there_are_at_most_a_hundred_plain_lines(clock, seconds_per_step):
    lines = lines_of_run(clock, 5000, seconds_per_step)
    assert 2 <= len(lines) <= 102
    assert lines[0].startswith("step 1/5000, loss 1.500, ") and lines[-1].startswith("step 5000/5000, ")


def test_a_line_comes_every_ten_seconds_of_a_short_run(clock):
    steps = [int(re.findall(r"\d+", line)[0]) for line in lines_of_run(clock, 60, 1.0)]
    assert steps == [1, 11, 21, 31, 41, 51, 60]


def test_the_time_left_is_of_the_steps_that_this_process_took(clock):
    [first, *_] = lines_of_run(clock, 100, 60.0, num_done_steps=90)
    assert first == "step 91/100, loss 1.500, 60.00 s/step, 9 min left"


def test_on_a_terminal_a_bar_is_drawn_and_closed(clock):
    stream = Terminal()
    bar = ProgressBar(2, 0, stream)
    bar.update(1, loss=1.5)
    bar.say("stopped early")
    bar.close()
    assert "\r" in stream.getvalue() and "\rstopped early\n" in stream.getvalue().replace("\r ", "\r")
    assert stream.getvalue().endswith("\n")


@pytest.mark.parametrize("leave", [True, False])
@pytest.mark.parametrize("error", [UserError("step 2 does not fit"), KeyboardInterrupt()])
def test_an_error_begins_its_own_line_on_a_terminal(monkeypatch, leave, error):
    """A bar over a loop is still drawn when an exception leaves the loop."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def recipe_main() -> None:
        for _ in tqdm([1, 2], file=stream, leave=leave):
            raise error

    with pytest.raises(SystemExit):
        run_recipe(recipe_main)
    line = "error: step 2 does not fit\n" if isinstance(error, UserError) else "\nstopped by SIGINT\n"
    assert "0/2" in stream.getvalue()
    assert stream.getvalue().endswith(f"\n{line}" if leave else f" \r{line}")
