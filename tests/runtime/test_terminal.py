"""Lines on a narrow terminal."""

import io
import os
import sys

from custom_components.runtime import terminal
from custom_components.runtime.terminal import say


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


TEXT = (
    "\ndevice cpu, dtype bf16, chosen for a processor with bf16 instructions, and a well-known adapter here/"
    + "a" * 90
    + "\n  tune run recipes/lora_single_device.py --config configs/tiny_qlora.yaml resume_from_checkpoint=true epochs=3"
)


def test_lines_are_broken_between_words_and_commands_stay_whole(monkeypatch):
    stdout = Terminal()
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(terminal.shutil, "get_terminal_size", lambda: os.terminal_size((80, 24)))
    say(TEXT)
    lines = stdout.getvalue().splitlines()
    assert lines[0] == "" and stdout.getvalue().split() == TEXT.split()
    assert all(len(line) <= 80 or len(line.split()) == 1 or line.startswith("  tune ") for line in lines)
    assert TEXT.splitlines()[-1] in lines and len(lines) == 5


def test_off_a_terminal_a_line_stays_whole(capsys):
    say(TEXT)
    assert capsys.readouterr().out == TEXT + "\n"
