"""Recipes as a user runs them: `tune run`, forked from a process that has the imports done, or started."""

import atexit
import functools
import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from custom_components.runtime.errors import run_recipe
from recipes import merge
from tests.support.paths import PROJECT

TUNE = Path(sys.executable).with_name("tune")
LIMIT_SECONDS = 300
# Threads that numpy and pyarrow would start when they are imported.
WITHOUT_THREADS = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}


def tune_run(*arguments: str, recipe: str = "lora_single_device", input: str = "") -> subprocess.CompletedProcess[str]:
    """`tune run` of a recipe in the project's directory, until it ends."""
    return ForkedTune("run", f"recipes/{recipe}.py", *arguments, input=input).result()


def started_tune(*arguments: str, input: str = "") -> subprocess.CompletedProcess[str]:
    """The `tune` command itself: where what its process does from its start on is what is tested."""
    return subprocess.run(
        [str(TUNE), *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=LIMIT_SECONDS, input=input
    )


class ForkedTune:
    """A `tune` command in the project's directory, in a process of its own that begins with the imports done.

    Its environment is that of the tests when the first command began.
    """

    def __init__(self, *arguments: str, input: str = "", stdin: int | None = None, stdout: int | None = None) -> None:
        """Start the command. What it prints is kept; `stdin` and `stdout` may be descriptors of pipes instead."""
        self._files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115  as long as the command is asked about
        self._files[0].write(input.encode())
        self._files[0].seek(0)
        descriptors = [file.fileno() for file in self._files]
        descriptors[0] = descriptors[0] if stdin is None else stdin
        descriptors[1] = descriptors[1] if stdout is None else stdout
        report, its_report = os.pipe()
        self._report = os.fdopen(report, "rb", buffering=0)
        command = json.dumps(["tune", *arguments]).encode()
        socket.send_fds(warm_tune(), [command], [*descriptors, its_report])
        os.close(its_report)
        self.arguments = arguments
        self.pid = int(self._report.readline())
        self.returncode: int | None = None

    def poll(self, timeout_seconds: float = 0) -> int | None:
        """The exit code, negative for a signal's number, or None while the command runs."""
        if self.returncode is None and select.select([self._report], [], [], timeout_seconds)[0]:
            self.returncode = int(self._report.readline())
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def result(self, timeout_seconds: float = LIMIT_SECONDS) -> subprocess.CompletedProcess[str]:
        """Wait for the end; the exit code and what was printed."""
        returncode = self.poll(timeout_seconds)
        if returncode is None:
            self.send_signal(signal.SIGKILL)
            raise subprocess.TimeoutExpired(self.arguments, timeout_seconds)
        printed = []
        for file in self._files[1:]:
            file.seek(0)
            printed.append(file.read().decode())
        return subprocess.CompletedProcess(self.arguments, returncode, *printed)


@functools.cache
def warm_tune() -> socket.socket:
    """The socket of tests/support/warm_tune.py, which ends when this process does."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, "-P", "tests/support/warm_tune.py", str(its.fileno())],
        cwd=PROJECT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=os.environ | WITHOUT_THREADS,
        pass_fds=[its.fileno()],
    )
    its.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def arguments(checkpoint: Path, rows: Path, output_dir: Path, *overrides: str) -> list[str]:
    """A small training run of `checkpoint` on the dialogs in `rows`."""
    return [
        *("--config", "configs/llama_qlora.yaml", f"checkpoint_dir={checkpoint}", f"dataset.source={rows}"),
        *("device=cpu", f"output_dir={output_dir}", "batch_size=2", "gradient_accumulation_steps=1", "cache_dir=null"),
        *overrides,
    ]


def run_merge(**overrides: object) -> tuple[int, str, str]:
    """Run merge.py in this process, with overrides of configs/merge.yaml: exit code, stdout and stderr."""
    arguments = [
        "--config",
        str(PROJECT / "configs/merge.yaml"),
        *(f"{key}={value}" for key, value in overrides.items()),
    ]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "argv", ["merge.py", *arguments]):
        try:
            run_recipe(merge.recipe_main)
        except SystemExit as exit:
            assert isinstance(exit.code, int)
            code = exit.code
    return code, out.getvalue(), err.getvalue()
