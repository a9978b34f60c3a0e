"""`tune` commands in processes of their own that begin with the imports done: see tests/support/warm_tune.py."""

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping

from tests.support.paths import PROJECT

LIMIT_SECONDS = 300
# Threads that numpy and pyarrow would start when they are imported.
WITHOUT_THREADS = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}


class WarmTune:
    """The process that commands are forked from. It ends when this object is closed, or the tests do."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._socket, its_socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "tests/support/warm_tune.py", str(its_socket.fileno())],
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**environment, **WITHOUT_THREADS},
            pass_fds=[its_socket.fileno()],
        )
        its_socket.close()

    def fork(self, command: Mapping[str, object], *descriptors: int) -> None:
        socket.send_fds(self._socket, [json.dumps(command).encode()], descriptors)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


@functools.cache
def warm_tune() -> WarmTune:
    """The warm process of all tests: their environment, and no cache but its own."""
    home = tempfile.TemporaryDirectory()  # noqa: SIM115  until the tests are over
    warm = WarmTune(os.environ | {"HF_HOME": home.name})
    atexit.register(home.cleanup)
    atexit.register(warm.close)
    return warm


class ForkedTune:
    """A `tune` command in the project's directory."""

    def __init__(
        self,
        *arguments: str,
        input: str = "",
        stdin: int | None = None,
        stdout: int | None = None,
        num_threads: int | None = None,
        environment: Mapping[str, str] | None = None,
        warm: WarmTune | None = None,
    ) -> None:
        """Start the command.

        Args:
            input: what it reads from stdin.
            stdin: a pipe's descriptor in place of `input`.
            stdout: a pipe's descriptor; by default what the command prints is kept for :meth:`result`.
            num_threads: of torch; by default those of the tests.
            environment: variables beside those of the tests.
            warm: a process with another environment than the tests'.
        """
        self._files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115  until nobody asks for the result
        self._files[0].write(input.encode())
        self._files[0].seek(0)
        descriptors = [file.fileno() for file in self._files]
        descriptors[0] = descriptors[0] if stdin is None else stdin
        descriptors[1] = descriptors[1] if stdout is None else stdout
        report, its_report = os.pipe()
        self._report = os.fdopen(report, "rb", buffering=0)
        own = {} if environment is None else {**environment}
        command = {"arguments": ["tune", *arguments], "num_threads": num_threads, "environment": own}
        (warm or warm_tune()).fork(command, *descriptors, its_report)
        os.close(its_report)
        self.arguments = arguments
        pid = self._report.readline()
        assert pid, "the warm process has ended; what it said is on stderr"
        self.pid = int(pid)
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
