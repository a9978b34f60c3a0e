"""Checks of the paths of a config: nothing that is written may be, contain or be part of what is read.

Whether something is at an output's path already is checked by the code that writes the output.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from custom_components.config.settings import Settings, path_text
from custom_components.runtime.paths import is_or_holds, named_files, real_path

_PROJECT = Path(__file__).parents[2]
# Arguments of components that are paths, by their names: their annotations often say no more than `str`.
_PATH_NAME = re.compile(r"(.+_)?(path|dir|file|files|filename|source)")
# These may also name a data set on the hub.
_DATA_NAMES = {"source", "data_files"}
# Loggers write files of their own names there.
_LOGGER_NAMES = {"log_dir", "dir", "filename"}
_STEP_DIRECTORY = re.compile(r"step_\d+")
_LOG_HEAD = b"Step "
_MOST_NAMED = 3


@dataclass(frozen=True)
class _Input:
    """A path that is read: the key that names it, where it is, and whether it is a folder."""

    key: str
    path: Path
    is_folder: bool


def is_path_name(name: str) -> bool:
    """Say whether an argument of a component is a path, by its name."""
    return _PATH_NAME.fullmatch(name) is not None


def path_text_problems(name: str, node: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Find the paths of a node with a `_component_` that are empty, or that no file can have."""
    for key, text in _node_paths(name, node):
        try:
            path_text(text)
        except ValueError as error:
            yield key, f"{text!r} should be {error}"


def output_problems(settings: Settings) -> Iterator[tuple[str, str]]:
    """Find outputs that would be written over what is read, or where no run may write, each with a message."""
    values = dict(settings)
    inputs = list(_inputs(values))
    if (output_dir := values.get("output_dir")) is not None:
        clauses = list(_forbidden_places(output_dir)) or [*_inputs_met(output_dir, inputs)][:_MOST_NAMED]
        # A resumed run may contain the checkpoint, but no run is written into one.
        resumed = values.get("resume_from_checkpoint")
        if isinstance(resumed, str) and _STEP_DIRECTORY.fullmatch(real_path(resumed).name):
            clauses += [f"is inside resume_from_checkpoint {resumed!r}"] if is_or_holds(resumed, output_dir) else []
        if clauses:
            yield "output_dir", f"{str(output_dir)!r} {' and '.join(clauses)}; name a directory apart from that"
    if (output_file := values.get("output_file")) is not None:
        for read in inputs:
            if not read.is_folder and is_or_holds(output_file, read.path):
                yield "output_file", f"{str(output_file)!r} is what {read.key} reads; name another file"
                break
    yield from _log_file_problems(values)


def _forbidden_places(output_dir: Path) -> Iterator[str]:
    places = {"working directory": Path(os.path.curdir), "home directory": Path("~"), "project": _PROJECT}
    if real_path(output_dir).parent == real_path(output_dir):
        yield "is the root of the file system"
        return
    for what, place in places.items():
        if is_or_holds(output_dir, place):
            yield f"{'is' if is_or_holds(place, output_dir) else 'holds'} the {what}"
            return


def _inputs_met(output_dir: Path, inputs: Iterable[_Input]) -> Iterator[str]:
    named: dict[str, Path] = {}
    for read in inputs:
        # A checkpoint's tokenizer is not named beside the checkpoint, nor the second file of a data set.
        if read.key in named or any(is_or_holds(path, read.path) for path in named.values()):
            continue
        is_held = is_or_holds(output_dir, read.path)
        is_inside = read.is_folder and is_or_holds(read.path, output_dir)
        if is_held or is_inside:
            named[read.key] = read.path
            verb = "is" if is_held and is_inside else "holds" if is_held else "is inside"
            yield f"{verb} {read.key} {str(read.path)!r}"


def _log_file_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Refuse a log file with other content: torchtune's DiskLogger appends to the file that it is given."""
    logger = values.get("metric_logger") or {}
    if not isinstance(name := logger.get("filename"), str):
        return
    path = real_path(Path(str(logger.get("log_dir", "")), name))
    if not os.path.isfile(path):  # noqa: PTH113
        return
    with path.open("rb") as file:
        head = file.read(len(_LOG_HEAD))
    if head not in (b"", _LOG_HEAD):
        yield "metric_logger.filename", f"{name!r}: {str(path)!r} exists and is not a logger's; name another file"


def _inputs(values: Mapping[str, Any]) -> Iterator[_Input]:
    for key, value in values.items():
        if isinstance(value, Path) and key not in ("output_dir", "output_file"):
            yield _input(key, value)
        elif isinstance(value, dict) and "_component_" in value:
            for node_key, text in _node_paths(key, value):
                name = node_key.rpartition(".")[2].partition("[")[0]
                if name in _DATA_NAMES:
                    yield from _data_inputs(node_key, text)
                elif name not in _LOGGER_NAMES:
                    yield _input(node_key, Path(text))
    for adapter in values.get("adapters", ()):
        yield _input("adapters", adapter.dir)


def _input(key: str, path: Path) -> _Input:
    return _Input(key, path, is_folder=not os.path.isfile(real_path(path)))  # noqa: PTH113


def _data_inputs(key: str, text: str) -> Iterator[_Input]:
    if os.path.isdir(real_path(text)):  # noqa: PTH112
        yield _Input(key, Path(text), is_folder=True)
    else:
        yield from (_Input(key, file, is_folder=False) for file in named_files(text))


def _node_paths(name: str, node: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield every path of a node with its place; `dataset.source` may be a list of paths, or of nodes with one."""
    for key, value in node.items():
        items = [(f"[{index}]", item) for index, item in enumerate(value)] if isinstance(value, list) else [("", value)]
        for place, item in items:
            if isinstance(item, dict) and key in _DATA_NAMES:
                yield from _node_paths(f"{name}.{key}{place}", item)
            elif isinstance(item, str) and is_path_name(key):
                yield f"{name}.{key}{place}", item
