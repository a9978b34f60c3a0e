"""Peak memory of a run: what torch allocated on CUDA, sampled anonymous memory of the process on the CPU."""

import threading
from pathlib import Path

import torch

_SAMPLING_INTERVAL_SECONDS = 0.02
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Measures from its construction on.

    On the CPU it samples the process's anonymous memory, less what stood at the construction (the imports); pages of
    mapped checkpoint files are not anonymous, the system takes them back at will. Where the system has no
    /proc/self/status, the CPU's figure is None.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._baseline_bytes = self._peak_bytes = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif _STATUS.exists():
            self._baseline_bytes = self._peak_bytes = _anonymous_bytes()
            threading.Thread(target=self._sample_forever, daemon=True).start()

    def gib(self) -> float | None:
        """Peak so far, in GiB."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**30
        if not _STATUS.exists():
            return None
        self._peak_bytes = max(self._peak_bytes, _anonymous_bytes())
        return (self._peak_bytes - self._baseline_bytes) / 2**30

    def _sample_forever(self) -> None:
        pause = threading.Event()
        while not pause.wait(_SAMPLING_INTERVAL_SECONDS):
            self._peak_bytes = max(self._peak_bytes, _anonymous_bytes())


def _anonymous_bytes() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
