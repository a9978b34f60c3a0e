"""Training runs as they are on disk, whether they are finished, stopped or still going, to be looked at together."""

import glob
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from custom_components.config.renamed import rename_components
from custom_components.config.training_kinds import training_kind
from custom_components.runs.checkpoints import run_checkpoints
from custom_components.runs.metrics import read_metrics
from custom_components.runs.recognition import (
    ADAPTER_NAME,
    RUN_CONFIG_KEYS,
    RUN_CONFIG_NAME,
    is_metrics,
    is_samples,
)
from custom_components.runs.run_directory import RunDirectory
from custom_components.runtime.errors import UserError
from custom_components.runtime.ownership import Recognises
from custom_components.runtime.plain_yaml import MOST_YAML_BYTES, read_yaml
from custom_components.runtime.text_files import read_text
from custom_components.weights.card import stated_steps
from custom_components.weights.trained_counts import num_adapter_parameters, num_trained_model_parameters

_MOST_NAMED = 3

Record = Mapping[str, Any]


@dataclass(frozen=True)
class RecordedRun:
    """A run on disk.

    Attributes:
        path: of its directory.
        name: the end of the path, as much of it as tells the run from those beside it.
        config: as the run resolved it, nested.
        steps: the records of its optimizer steps.
        validations: the records of its validations.
        samples: the records of its answers to `sample_prompts`.
        result: the directory of its trained weights: adapter/, or model/; it is not there before the run has ended.
        num_trained: trained parameters; None: no weights have been saved yet.
    """

    path: Path
    name: str
    config: Mapping[str, Any]
    steps: Sequence[Record]
    validations: Sequence[Record]
    samples: Sequence[Record]
    result: Path
    num_trained: int | None

    @property
    def has_pairs(self) -> bool:
        """Whether its losses are per pair of answers, and not per supervised token."""
        return any("reward_margin" in record for record in self.steps)

    @property
    def best_validation(self) -> Record | None:
        """The record of the validation with the least loss, the first of several."""
        measured = [record for record in self.validations if record.get("val_loss") is not None]
        return min(measured, key=lambda record: record["val_loss"], default=None)

    @property
    def peak_memory_gib(self) -> float | None:
        return max(_numbers(self.steps, "peak_memory_gib"), default=None)

    @property
    def tokens_per_second(self) -> float | None:
        """The tokens of all steps over the seconds of all steps."""
        seconds = math.fsum(_numbers(self.steps, "step_seconds"))
        return sum(_numbers(self.steps, "tokens")) / seconds if seconds else None

    @property
    def progress_words(self) -> str:
        """How many optimizer steps it took, and of how many where it was stopped."""
        if not self.steps:
            return "none yet"
        num_steps = self.steps[-1]["step"]
        stated = stated_steps(self.result)
        if stated is None or stated.num_steps != num_steps:
            return f"{num_steps} so far"
        return str(num_steps) if stated.is_finished else f"{num_steps} of {stated.num_planned_steps}, stopped"

    def tokens_by_step(self) -> dict[int, int]:
        """Sum the tokens up to each step; empty where the records do not have them."""
        total, by_step = 0, {}
        for record in self.steps:
            if record.get("tokens") is None:
                return {}
            total += record["tokens"]
            by_step[record["step"]] = total
        return by_step

    def shown_samples(self) -> tuple[int | None, dict[str, str]]:
        """Give the answers to `sample_prompts` after the best validation, else after the last, with that step."""
        steps = {record["step"] for record in self.samples}
        best = self.best_validation
        step = best["step"] if best is not None and best["step"] in steps else max(steps, default=None)
        return step, {record["prompt"]: record["answer"] for record in self.samples if record["step"] == step}


def open_recorded_runs(patterns: Sequence[Path]) -> list[RecordedRun]:
    """Read the runs of several directories.

    Args:
        patterns: directories, or globs of them; of what a glob names, directories that are not of a run are left out.

    Raises:
        UserError: a directory is not of a run or is named twice, a glob names no run, a file is not what a run writes.
    """
    paths = [path for pattern in patterns for path in _directories(pattern)]
    problems = [problem for path in dict.fromkeys(paths) if (problem := _problem(path)) is not None]
    seen: dict[Path, Path] = {}
    for path in paths:
        if (first := seen.setdefault(path.resolve(), path)) is not path:
            problems.append(f"run_dirs: {str(path)!r} is the run {str(first)!r}, which is named already; name it once")
    if problems:
        raise UserError(*problems)
    return [_open(path, name) for path, name in zip(paths, names_apart(paths), strict=True)]


def names_apart(paths: Sequence[Path]) -> list[str]:
    """Give each path the shortest end of it that no other has, in whole parts."""
    parts = [path.absolute().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len({*names}) == len(names):
            return names
    return [str(path) for path in paths]


def _directories(pattern: Path) -> list[Path]:
    if pattern.exists() or not glob.has_magic(str(pattern)):
        return [pattern]
    named = [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True))]  # noqa: PTH207
    runs = [path for path in named if (path / RUN_CONFIG_NAME).is_file()]
    if not runs:
        raise UserError(f"run_dirs: {str(pattern)!r} names no directory of a run; name output_dir's of runs")
    return runs


def _problem(path: Path) -> str | None:
    """Say what keeps a directory from being one of a run."""
    if not path.is_dir():
        what = "a file" if path.is_file() else "not there"
        return f"run_dirs: {str(path)!r} is {what}; name the output_dir of a run"
    if not (path / RUN_CONFIG_NAME).is_file():
        inside = sorted(entry.parent.name for entry in path.glob(f"*/{RUN_CONFIG_NAME}"))[:_MOST_NAMED]
        around = next((parent for parent in path.parents if (parent / RUN_CONFIG_NAME).is_file()), None)
        hint = f"name {str(around)!r}, which it is in" if around else "name the output_dir of one"
        if inside:
            hint = f"those in it, {', '.join(inside)}, are named by '{path}/*'"
        return f"run_dirs: {str(path)!r} is not the directory of a run, it has no {RUN_CONFIG_NAME}; {hint}"
    return None


def _open(path: Path, name: str) -> RecordedRun:
    config = _read_config(path / RUN_CONFIG_NAME)
    directory = RunDirectory(path, training_kind(config).result_name)
    records = _read_records(directory.metrics, is_metrics)
    return RecordedRun(
        path,
        name,
        config,
        steps=[record for record in records if "val_loss" not in record],
        validations=[record for record in records if "val_loss" in record],
        samples=_read_records(directory.samples, is_samples),
        result=directory.result,
        num_trained=_num_trained(directory, config),
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = read_yaml(read_text(path, MOST_YAML_BYTES))
    except (OSError, ValueError) as error:
        raise UserError(f"run_dirs: {str(path)!r} cannot be read ({error}); name the output_dir of a run") from None
    if not isinstance(config, dict) or not config.keys() >= RUN_CONFIG_KEYS:
        raise UserError(f"run_dirs: {str(path)!r} is not the config of a training run; name the output_dir of one")
    rename_components(config)
    return config


def _read_records(path: Path, is_ours: Recognises) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    if not is_ours(path):
        raise UserError(f"run_dirs: {str(path)!r} is not as a run writes it; leave that run out, or restore the file")
    return read_metrics(path)


def _num_trained(directory: RunDirectory, config: Mapping[str, Any]) -> int | None:
    """Count what is trained: in the result, else in the newest checkpoint."""
    saved = [checkpoint / directory.result_name for checkpoint in run_checkpoints(directory.path)]
    newest = next((path for path in (directory.result, *reversed(saved)) if path.is_dir()), None)
    if newest is None:
        return None
    if directory.result_name == ADAPTER_NAME:
        return num_adapter_parameters(newest, config.get("init_lora_weights"))
    return num_trained_model_parameters(newest, config.get("train_only"))


def _numbers(records: Sequence[Record], key: str) -> list[float]:
    return [record[key] for record in records if record.get(key) is not None]
