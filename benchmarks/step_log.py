"""When each optimizer step ended, and its loss: one JSON object a line, written by whatever tool is measured.

Imports nothing but the standard library, so that it also runs where this package is not installed.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StepEnd:
    """The loss per supervised token, in nats, and the wall clock, in seconds, when the step ended."""

    loss: float
    ended_at_seconds: float


class StepLog:
    """A metric logger in torchtune's protocol, which its recipe and ours call at the end of every step."""

    def __init__(self, path: str) -> None:
        log_path = Path(path)
        self._file = log_path.open("w", encoding="utf-8")

    def log_config(self, config: Any) -> None:
        """Part of the protocol; the config is of no interest here."""

    def log(self, name: str, data: Any, step: int) -> None:
        self.log_dict({name: data}, step)

    def log_dict(self, payload: Mapping[str, Any], step: int) -> None:
        if "loss" not in payload:  # a validation
            return
        self._file.write(json.dumps({"loss": float(payload["loss"]), "ended_at_seconds": time.time()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_step_log(path: Path) -> list[StepEnd]:
    return [StepEnd(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
