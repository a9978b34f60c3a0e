"""metrics.jsonl and samples.jsonl, one JSON object per line."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from custom_components.runtime.atomic_files import whole_file
from custom_components.runtime.errors import UserError
from custom_components.runtime.terminal import say
from custom_components.runtime.text_files import check_is_file

_NUMBERS = (
    *("epoch", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "step_seconds", "tokens_per_second"),
    *("peak_memory_gib", "val_loss", "val_perplexity"),
)


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
    """Read all records; a last line torn by a kill is left out, and so are damaged ones, which is said.

    Raises:
        OSError: the file cannot be read.
    """
    check_is_file(path)
    *lines, torn = path.read_bytes().split(b"\n")
    records = {number: _record(line) for number, line in enumerate(lines, 1)}
    if damaged := [number for number, record in records.items() if record is None]:
        more = f" and {len(damaged) - 1} more lines are" if len(damaged) > 1 else " is"
        say(f"{path}:{damaged[0]}{more} damaged and left out")
    if (last := _record(torn)) is not None:
        records[len(lines) + 1] = last
    return [record for record in records.values() if record is not None]


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and math.isfinite(value))


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    is_record = (
        isinstance(record, dict)
        and type(record.get("step")) is int
        and record["step"] >= 0
        and all(_is_number(record.get(key)) for key in _NUMBERS)
    )
    return record if is_record else None


def keep_metrics_until(before: Path, path: Path, step: int) -> None:
    """Write to `path` the records of `before` up to a step; a resumed run will write those after it again.

    Raises:
        UserError: `before` cannot be read.
    """
    try:
        kept = [record for record in read_metrics(before) if record["step"] <= step]
    except OSError as error:
        raise UserError(
            f"resume_from_checkpoint: {str(before)!r} cannot be read ({error.strerror}); move it away, and the run "
            "goes on without the records so far"
        ) from None
    with whole_file(path) as aside:
        aside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def write_samples(path: Path, step: int, prompts: Sequence[str], answers: Sequence[str]) -> None:
    """Append the model's answers after a step, one JSON object per line."""
    samples = MetricsFile(path)
    for prompt, answer in zip(prompts, answers, strict=True):
        samples.write({"step": step, "prompt": prompt, "answer": answer})
    samples.close()
