"""The record of what a merged model is made of, so that no adapter is merged twice or into the wrong model."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from custom_components.export.merged_weights import MergedAdapter
from custom_components.runtime.errors import UserError
from custom_components.runtime.ownership import OwnDirectory
from custom_components.runtime.plain_yaml import MOST_YAML_BYTES, read_yaml
from custom_components.runtime.text_files import read_text
from custom_components.runtime.validation import value_problems
from custom_components.weights.checkpoint_files import BaseCheckpoint

RECORD_NAME = "merge.yaml"


class _MergedIn(BaseModel):
    """An adapter that was merged in."""

    model_config = ConfigDict(strict=True)

    dir: str
    weight: Annotated[float, Field(allow_inf_nan=False)]
    digest: str


class _Record(BaseModel):
    """merge.yaml."""

    model_config = ConfigDict(strict=True)

    adapters: Annotated[list[_MergedIn], Field(min_length=1)]
    # Of before 0.1, without sizes.
    files: dict[str, Annotated[int, Field(ge=0)]] = {}


def write_record(directory: Path, base: BaseCheckpoint, merged_onto: str, adapters: Sequence[MergedAdapter]) -> None:
    """Write merge.yaml: the base, the adapters in it, those of a merged base included, and the files, all written.

    Args:
        directory: with all other files in it.
        merged_onto: which of the base's weights, "original" or "dequantized".
    """
    files = sorted(path for path in directory.iterdir() if path.name != RECORD_NAME)
    record = {
        "base_model": base.hub_name or _last_parts(base.directory),
        "base": merged_onto,
        "adapters": [
            *_adapters_in(base.directory),
            *({"dir": _last_parts(a.directory), "weight": a.weight, "digest": a.digest} for a in adapters),
        ],
        "files": {path.name: path.stat().st_size for path in files},
    }
    text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True)
    (directory / RECORD_NAME).write_text(text, encoding="utf-8")


def check_not_merged_yet(checkpoint_dir: Path, adapters: Sequence[MergedAdapter], *, allow_merged_base: bool) -> None:
    """Refuse a base that already contains one of the adapters, and other merged bases unless they are allowed.

    Raises:
        UserError: the base is such a one.
    """
    merged = {entry["digest"]: entry["dir"] for entry in _adapters_in(checkpoint_dir)}
    for adapter in adapters:
        if adapter.digest in merged:
            raise UserError(
                f"checkpoint_dir: {str(checkpoint_dir)!r} has the adapter {str(adapter.directory)!r} in it already; "
                "name the checkpoint that it was trained on"
            )
    if merged and not allow_merged_base:
        raise UserError(
            f"checkpoint_dir: {str(checkpoint_dir)!r} is a merge with {', '.join(merged.values())}; name the "
            "checkpoint that the adapter was trained on, or, if that is the merge, set allow_merged_base=true"
        )


def merge_in(directory: Path) -> OwnDirectory | None:
    """Describe the merge in a directory by the names and sizes, in bytes, of its files; None: none is recorded."""
    try:
        record = _read_record(directory)
    except (OSError, ValueError):
        return None
    entries = {re.escape(name): _has_size(num_bytes) for name, num_bytes in record.files.items()}
    return OwnDirectory({**entries, re.escape(RECORD_NAME): lambda path: True})


def _has_size(num_bytes: int) -> Callable[[Path], bool]:
    return lambda path: path.stat().st_size == num_bytes


def is_merge(directory: Path) -> bool:
    return (directory / RECORD_NAME).is_file()


def _last_parts(directory: Path) -> str:
    """Give the end of a path, enough to know it by: merged directories are published, and the rest is private."""
    return "/".join(directory.resolve().parts[-2:])


def _adapters_in(checkpoint_dir: Path) -> list[dict[str, Any]]:
    if not is_merge(checkpoint_dir):
        return []
    try:
        return [dict(adapter) for adapter in _read_record(checkpoint_dir).adapters]
    except ValidationError as error:
        place, message = next(iter(value_problems(error, None, lambda place: "").items()))
        raise UserError(f"{checkpoint_dir / RECORD_NAME}: not the record of a merge ({place}: {message})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint_dir / RECORD_NAME}: not the record of a merge ({error})") from None


def _read_record(directory: Path) -> _Record:
    """Read merge.yaml.

    Raises:
        OSError, ValueError: it cannot be read, or is not one; pydantic's error is a ValueError.
    """
    return _Record.model_validate(read_yaml(read_text(directory / RECORD_NAME, MOST_YAML_BYTES)))
