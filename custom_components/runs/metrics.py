"""metrics.jsonl and samples.jsonl, one JSON object per line."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from custom_components.runtime.atomic_files import whole_file


class MetricsFile:
    """Appends records to a file, flushed one by one, so that a killed run has every step it finished."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        # NaN and infinity are not JSON; the gradient norm of a step that the fp16 scaler skipped is one of them.
        finite = {
            key: None if value in (math.inf, -math.inf) or value != value else value for key, value in record.items()
        }
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read all records; a last line torn by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def keep_metrics_until(before: Path, path: Path, step: int) -> None:
    """Write to `path` the records of `before` up to a step; a resumed run will write those after it again."""
    kept = [record for record in read_metrics(before) if record["step"] <= step]
    with whole_file(path) as aside:
        aside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def write_samples(path: Path, step: int, prompts: Sequence[str], answers: Sequence[str]) -> None:
    """Append the model's answers after a step, one JSON object per line."""
    samples = MetricsFile(path)
    for prompt, answer in zip(prompts, answers, strict=True):
        samples.write({"step": step, "prompt": prompt, "answer": answer})
    samples.close()
