"""Lines on a narrow terminal."""

import os
import sys

import pytest

from custom_components.runtime.errors import UserError, print_errors
from custom_components.runtime.terminal import say, say_if_read
from tests.support.terminal import Terminal

COMMAND = (
    "  tune run recipes/lora_single_device.py --config configs/tiny_qlora.yaml resume_from_checkpoint=true epochs=3"
)
TEXT = (
    "\ndevice cpu, dtype bf16, chosen for a processor with bf16 instructions, and a well-known adapter here/"
    + "a" * 90
    + f"\n{COMMAND}"
)


def lines_on_terminal(num_columns, print_to):
    """The lines that a function prints to a terminal of this width."""
    terminal = Terminal(num_columns)
    with open(terminal.descriptor, "w", closefd=False) as stream:  # noqa: PTH123  a descriptor has no path
        print_to(stream)
    return terminal.text().splitlines()


@pytest.mark.parametrize("num_columns", [80, 40])
def test_lines_are_broken_between_words_and_commands_stay_whole(num_columns):
    """Whatever stdout is: here it is no terminal."""
    lines = lines_on_terminal(num_columns, lambda stream: say(TEXT, stream))
    assert lines[0] == "" and " ".join(lines).split() == TEXT.split()
    assert all(len(line) <= num_columns or len(line.split()) == 1 or line == COMMAND for line in lines)
    assert lines[-1] == COMMAND and len(lines) >= 5


def test_an_error_is_broken_between_words_on_a_terminal_and_one_line_elsewhere(monkeypatch, capsys):
    error = UserError(f"dataset.source: {'no such file ' * 10}", "seed: 'x' should be a whole number")

    def print_to(stream):
        monkeypatch.setattr(sys, "stderr", stream)
        print_errors(error)
        monkeypatch.undo()

    lines = lines_on_terminal(80, print_to)
    assert [line.startswith("error: ") for line in lines] == [True, False, True] and max(map(len, lines)) <= 80
    print_errors(error)
    assert capsys.readouterr().err.splitlines() == [f"error: {message}" for message in error.messages]


def test_off_a_terminal_a_line_stays_whole(capsys):
    say(TEXT)
    assert capsys.readouterr().out == TEXT + "\n"


def test_what_nobody_reads_does_not_end_a_run():
    """Ctrl-C ends tee of `tune run ... 2>&1 | tee log`, while the run has still to save."""
    read, write = os.pipe()
    with open(write, "w") as stream:  # noqa: PTH123
        say_if_read("read", stream)
        os.close(read)
        say_if_read("lost", stream)
        say("lost too", stream)
