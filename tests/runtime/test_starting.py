"""What happens before torch is imported: Ctrl-C in one line, Windows said, nothing in other people's processes."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import PROJECT
from tests.support.tune_process import python_process, write_tune

# A torch whose import is interrupted, as Ctrl-C does it; like some libraries, it would swallow the KeyboardInterrupt.
INTERRUPTED = """\
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except BaseException:
    pass
raise AssertionError("still there")
"""
COMMANDS = {
    "tune": ["run", "recipes/preview.py", "--config", "configs/tiny_qlora.yaml"],
    "recipe": ["-m", "recipes.preview", "--config", "configs/tiny_qlora.yaml"],
    "demo": ["-m", "examples.tiny_llama.demo"],
    "benchmark": ["-m", "benchmarks.cost_growth"],
}


def fake_torch(folder: Path, source: str) -> Path:
    for name in ("torch", "torchtune"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(source)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_importing_is_one_line_and_130(tmp_path, command):
    arguments = [write_tune(tmp_path)] * (command == "tune") + COMMANDS[command]
    result = python_process(*arguments, first_path=fake_torch(tmp_path, INTERRUPTED))
    assert result.returncode == 130, result.stderr
    assert result.stderr.split() == ["stopped", "by", "SIGINT"] and not result.stdout


def test_a_sigint_that_the_parent_ignores_stays_ignored(tmp_path):
    fake_torch(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('went on'); os._exit(7)")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result = python_process(write_tune(tmp_path), *COMMANDS["tune"], first_path=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.returncode == 7, result.stderr


LOADING = """\
import os, signal, sys, time
from custom_components.runtime.errors import run_recipe
from custom_components.runtime.starting import start_command
start_command()
def recipe_main():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    finally:
        print("put in order")
run_recipe(recipe_main)
"""


def test_ctrl_c_while_loading_puts_things_in_order_and_is_one_line(tmp_path):
    result = python_process("-c", LOADING)
    assert (result.returncode, result.stdout, result.stderr) == (130, "put in order\n", "stopped by SIGINT\n")


@pytest.mark.parametrize("command", ["tune", "recipe"])
def test_a_terminal_is_told_what_it_waits_for_and_a_file_is_not(tmp_path, command):
    fake_torch(tmp_path, "import os; os._exit(7)")
    arguments = [str(write_tune(tmp_path))] * (command == "tune") + COMMANDS[command]
    assert python_process(*arguments, first_path=tmp_path).stderr == ""
    terminal, end = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PROJECT}"}
    subprocess.run([sys.executable, *arguments], cwd=PROJECT, env=environment, stderr=end, timeout=60, check=False)
    assert os.read(terminal, 1000) == b"importing PyTorch ...\r\n"


def test_importing_a_recipe_changes_no_signal_handler():
    code = "import signal, recipes, examples; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert python_process("-c", code).stdout == "True\n"


# Python as it is on Windows, as far as is asked: no fcntl, and sys.platform says so before anything is imported.
ON_WINDOWS = "import sys; sys.platform = 'win32'; sys.modules['fcntl'] = None; "
WORDS = "llama-lora-recipes runs on Linux, macOS and WSL (Windows Subsystem for Linux), not on Windows itself"


def test_windows_is_said_at_import_and_by_the_commands(tmp_path):
    result = python_process("-c", f"{ON_WINDOWS} import custom_components.runs.run_directory")
    assert result.stderr.endswith(f"ImportError: {WORDS}\n") and "fcntl" not in result.stderr
    recipe = f"{ON_WINDOWS} import runpy; runpy.run_module('recipes.preview', run_name='__main__')"
    result = python_process("-c", recipe)
    assert (result.returncode, result.stderr) == (2, f"error: {WORDS}\n")
    tune = write_tune(tmp_path)
    tune.write_text(f"{ON_WINDOWS}\n{tune.read_text()}")
    for name in ("tune", "tune.exe"):
        tune = tune.rename(tune.with_name(name))
        result = python_process("-S", tune, "run", "recipes\\preview.py", "--config", "x")
        assert (result.returncode, result.stderr) == (2, f"error: {WORDS}\n")


def test_other_programs_of_the_environment_are_left_alone():
    """The .pth file runs in every Python of the environment; only `tune` is its business."""
    line = (PROJECT / "llama_lora_recipes.pth").read_text()
    code = f"exec({line!r}); import sys; print([name for name in sys.modules if name.startswith('custom_components')])"
    assert python_process("-c", code, "tune-in").stdout == "[]\n"
    assert line.count("\n") == 1 and line.startswith("import ")
