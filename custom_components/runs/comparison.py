"""What differs between runs and what came of each, as the rows of a table with a column for every run."""

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from custom_components.config.full_settings import FullSettings
from custom_components.config.knobs import link_knobs
from custom_components.config.preference_settings import PreferenceSettings
from custom_components.config.settings import ComponentNode, Settings
from custom_components.config.training_kinds import training_kind
from custom_components.runs.recorded_run import RecordedRun
from custom_components.runs.run_config import flat_config

ABSENT = "-"
# Where a run is written and what is kept of it, not what it learns.
_NOT_OF_TRAINING = {
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "cache_dir", "metric_logger"),
    *("log_every_n_steps", "save_every_n_steps", "save_every_minutes", "keep_last_n_checkpoints", "verify_base"),
    *("quantized_cache", "sample_prompts"),
}
_MISSING = object()


@dataclass(frozen=True)
class TableRow:
    """A row of a table of runs.

    Attributes:
        cells: a text for each run.
    """

    label: str
    cells: tuple[str, ...]


def difference_rows(runs: Sequence[RecordedRun]) -> list[TableRow]:
    """List the keys in which the runs' configs differ, in the order of the configs.

    A key of a node that follows a top-level key in every run is left out, and so are keys of where a run is written. A
    key that a config does not have counts as its default.
    """
    configs = [_KnownConfig.of(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config.values)
    rows = [TableRow("trains", tuple(config.trains for config in configs))]
    for key in keys:
        if not {*key.split(".")} & _NOT_OF_TRAINING and _differs(key, configs):
            rows.append(TableRow(key, _written_apart([config.value(key) for config in configs])))
    return [row for row in rows if len({*row.cells}) > 1]


def measure_rows(runs: Sequence[RecordedRun]) -> list[TableRow]:
    """List what the runs took and how well they learned."""
    rows = [
        TableRow("trained parameters", tuple(_number(run.num_trained, ",d") for run in runs)),
        TableRow("optimizer steps", tuple(run.progress_words for run in runs)),
        TableRow("peak memory, GiB", tuple(_number(run.peak_memory_gib, ".2f") for run in runs)),
        TableRow("tokens per second", tuple(_number(run.tokens_per_second, ",.0f") for run in runs)),
    ]
    for has_pairs in (False, True):
        if any(run.has_pairs == has_pairs for run in runs):
            unit = " per pair" if has_pairs else ""
            best = [run.best_validation if run.has_pairs == has_pairs else None for run in runs]
            for label, key, form in ((f"best val loss{unit}", "val_loss", ".4f"), ("  after step", "step", "d")):
                values = (None if record is None else record[key] for record in best)
                rows.append(TableRow(label, tuple(_number(value, form) for value in values)))
    return rows


@dataclass(frozen=True)
class _KnownConfig:
    """A run's config, with what its recipe makes of keys that it does not have.

    Attributes:
        values: by dotted key.
        linked: the same, where keys that follow a top-level key refer to it, such as `${lora_rank}`.
    """

    values: Mapping[str, Any]
    linked: Mapping[str, Any]
    settings_type: type[Settings]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "_KnownConfig":
        linked = copy.deepcopy(dict(config))
        link_knobs(linked)
        return cls(flat_config(config), flat_config(linked), training_kind(config))

    @property
    def trains(self) -> str:
        if issubclass(self.settings_type, FullSettings):
            return "the model"
        return "an adapter, on pairs" if issubclass(self.settings_type, PreferenceSettings) else "an adapter"

    def value(self, key: str) -> Any:
        return self.values.get(key, self.default(key))

    def default(self, key: str) -> Any:
        """Give the value of a key that nobody sets; of a node's component, the one that the recipe is made for."""
        node, _, name = key.partition(".")
        field = self.settings_type.model_fields.get(node)
        if field is not None and name == "_component_":
            return next((marker.ours for marker in field.metadata if isinstance(marker, ComponentNode)), _MISSING)
        return _MISSING if field is None or name or field.is_required() else field.get_default()

    def follows(self, key: str) -> bool:
        """Whether a key of a node is absent or says what a top-level key says."""
        linked = self.linked.get(key, _MISSING)
        is_reference = isinstance(linked, str) and linked.startswith("${")
        return linked is _MISSING or is_reference or linked == self.values.get(key.rpartition(".")[2], _MISSING)

    def has_own_default(self, key: str) -> bool:
        """Whether a key is absent, or as it is if nobody sets it."""
        return key not in self.values or self.values[key] == self.default(key)


def _differs(key: str, configs: Sequence[_KnownConfig]) -> bool:
    if "." in key and all(config.follows(key) for config in configs):
        return False
    # What only another recipe has, and is there without effect.
    return not all(config.has_own_default(key) for config in configs)


def _written_apart(values: Sequence[Any]) -> tuple[str, ...]:
    """Write the values of a key: components by their last names, and paths without their common folder."""
    written = tuple(map(_written, values))
    paths = {text for text in written if "/" in text}
    if len(paths) > 1 and (folder := os.path.commonpath(paths) if _are_alike(paths) else ""):
        return tuple(f"…{text.removeprefix(folder)}" if text in paths else text for text in written)
    of_packages = ("custom_components.", "torch")
    short = tuple(text.rpartition(".")[2] if text.startswith(of_packages) else text for text in written)
    return short if len({*short}) == len({*written}) else written


def _are_alike(paths: Iterable[str]) -> bool:
    """Whether paths are all relative or all absolute, as a common folder needs."""
    return len({os.path.isabs(path) for path in paths}) == 1  # noqa: PTH117


def _written(value: Any) -> str:
    if value is _MISSING:
        return ABSENT
    if isinstance(value, list):
        return ", ".join(map(_written, value)) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_written(item)}" for key, item in value.items()) or "{}"
    return str(value) if not isinstance(value, PurePath) else value.as_posix()


def _number(value: float | None, form: str) -> str:
    return ABSENT if value is None else format(value, form)
