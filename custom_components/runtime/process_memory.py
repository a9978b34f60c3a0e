"""Peak memory of a run: what torch allocated on CUDA, sampled anonymous memory of the process on the CPU."""

import threading
import weakref
from pathlib import Path

import torch

_SAMPLING_INTERVAL_SECONDS = 0.02
_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")
# The kernel's limit for a container, cgroup version 2.
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
# A tenth is left for fragmentation and for other programs.
_USABLE_SHARE = 0.9


class PeakMemory:
    """Measures the peak from its construction on, as long as it is referred to.

    On the CPU it samples the process's anonymous memory, less the amount at its construction (the imports); pages of
    mapped checkpoint files are not anonymous, the system can reclaim them at any time. If the system has no
    /proc/self/status, the CPU's figure is None.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._baseline_bytes = self._peak_bytes = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif _STATUS.exists():
            self._baseline_bytes = self._peak_bytes = _anonymous_bytes()
            threading.Thread(target=_sample, args=(weakref.ref(self),), daemon=True).start()

    def gib(self) -> float | None:
        """Give the peak so far, in GiB."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**30
        if not _STATUS.exists():
            return None
        self.sample()
        return (self._peak_bytes - self._baseline_bytes) / 2**30

    def sample(self) -> None:
        """Take note of the anonymous memory as it is now."""
        self._peak_bytes = max(self._peak_bytes, _anonymous_bytes())


def _sample(reference: "weakref.ref[PeakMemory]") -> None:
    pause = threading.Event()
    while not pause.wait(_SAMPLING_INTERVAL_SECONDS):
        if (memory := reference()) is None:
            return
        memory.sample()
        del memory


def usable_bytes(device: torch.device) -> int | None:
    """Give the memory that a run may still take on a device, with a reserve; None if the system does not say."""
    if device.type == "cuda":
        return int(_USABLE_SHARE * torch.cuda.mem_get_info(device)[0])
    if not _MEMINFO.exists():
        return None
    available_bytes = _line_bytes(_MEMINFO, "MemAvailable:")
    if _CONTAINER_LIMIT.exists() and (limit := _CONTAINER_LIMIT.read_text().strip()) != "max":
        available_bytes = min(available_bytes, int(limit) - _anonymous_bytes())
    return int(_USABLE_SHARE * available_bytes)


def _anonymous_bytes() -> int:
    return _line_bytes(_STATUS, "RssAnon:")


def _line_bytes(path: Path, name: str) -> int:
    """Read the value of a line of a file in /proc, which counts in kB."""
    return next(int(line.split()[1]) * 1024 for line in path.read_text().splitlines() if line.startswith(name))
