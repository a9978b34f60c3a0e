"""Running a tool in a process of its own, with its memory sampled from outside."""

import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).parent.parent
_SAMPLING_INTERVAL_SECONDS = 0.02
_NUM_LOG_LINES_SHOWN = 30


@dataclass(frozen=True)
class ToolProcess:
    """A process that has ended well.

    Attributes:
        started_at_seconds: wall clock.
        seconds: from start to exit.
        anonymous_samples: (wall clock, anonymous resident bytes).
        processor_samples: (wall clock, seconds that the process has had of all processors).
        peak_resident_bytes: VmHWM, with the pages of mapped files.
        output: of its standard output.
    """

    started_at_seconds: float
    seconds: float
    anonymous_samples: list[tuple[float, int]]
    processor_samples: list[tuple[float, float]]
    peak_resident_bytes: int
    output: str

    def peak_anonymous_bytes(self, until_seconds: float = math.inf) -> int:
        """The peak, of the whole process or until a time of the wall clock."""
        return max(num_bytes for sampled_at, num_bytes in self.anonymous_samples if sampled_at <= until_seconds)

    def processor_seconds(self, until_seconds: float) -> float:
        """What the process had had of all processors at the sample nearest to a time of the wall clock."""
        return min(self.processor_samples, key=lambda sample: abs(sample[0] - until_seconds))[1]


def run_tool(command: Sequence[str | Path], log_path: Path) -> ToolProcess:
    """Run a command from the project's root, on the CPU and without the network, and wait for it.

    The memory is that of the command's own process: no tool measured here starts others.

    Raises:
        SystemExit: the command failed; with the end of its log.
    """
    environment = {
        "GOMP_SPINCOUNT": "3000",  # see custom_components/runtime/tune_startup.py: the same for every tool
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    started_at_seconds = time.time()
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=log)
        samples: list[tuple[float, int]] = []
        processor_samples: list[tuple[float, float]] = []
        peak_resident_bytes = 0
        output: list[bytes] = []
        assert process.stdout is not None
        reader = threading.Thread(target=lambda stream: output.append(stream.read()), args=(process.stdout,))
        reader.start()
        try:
            while process.poll() is None:
                status = _status_bytes(process.pid)
                if "RssAnon" in status:  # a process that is ending has no memory any more
                    samples.append((time.time(), status["RssAnon"]))
                    processor_samples.append((time.time(), _processor_seconds(process.pid)))
                    peak_resident_bytes = status["VmHWM"]
                time.sleep(_SAMPLING_INTERVAL_SECONDS)
        finally:
            process.kill()  # where this program itself is stopped
            process.wait()
        reader.join()
    seconds = time.time() - started_at_seconds
    text = output[0].decode(errors="replace")
    if process.returncode != 0:
        lines = (text + log_path.read_text(encoding="utf-8", errors="replace")).splitlines()
        tail = "\n".join(lines[-_NUM_LOG_LINES_SHOWN:])
        sys.exit(f"error: exit code {process.returncode} of {' '.join(map(str, command))}\n{tail}")
    return ToolProcess(started_at_seconds, seconds, samples, processor_samples, peak_resident_bytes, text)


def _processor_seconds(pid: int) -> float:
    """User and system time of all threads: fields 14 and 15 of /proc/PID/stat, proc(5); the second may hold spaces."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def _status_bytes(pid: int) -> dict[str, int]:
    """The memory lines of /proc/PID/status, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
