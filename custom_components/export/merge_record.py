"""The record of what a merged model is made of, so that no adapter is merged twice or into the wrong model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from custom_components.export.merged_weights import MergedAdapter
from custom_components.runtime.errors import UserError
from custom_components.weights.checkpoint_files import BaseCheckpoint

RECORD_NAME = "merge.yaml"


def write_record(directory: Path, base: BaseCheckpoint, merged_onto: str, adapters: Sequence[MergedAdapter]) -> None:
    """Write merge.yaml: the base, and the adapters in it, those of a merged base included.

    Args:
        merged_onto: which of the base's weights, "original" or "dequantized".
    """
    record = {
        "base_model": base.hub_name or _last_parts(base.directory),
        "base": merged_onto,
        "adapters": [
            *_adapters_in(base.directory),
            *({"dir": _last_parts(a.directory), "weight": a.weight, "digest": a.digest} for a in adapters),
        ],
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


def is_merge(directory: Path) -> bool:
    return (directory / RECORD_NAME).is_file()


def _last_parts(directory: Path) -> str:
    """Give the end of a path, enough to know it by: merged directories are published, and the rest is private."""
    return "/".join(directory.resolve().parts[-2:])


def _adapters_in(checkpoint_dir: Path) -> list[dict[str, Any]]:
    if not is_merge(checkpoint_dir):
        return []
    path = checkpoint_dir / RECORD_NAME
    try:
        adapters = yaml.safe_load(path.read_text(encoding="utf-8"))["adapters"]
        return [{"dir": str(a["dir"]), "weight": a["weight"], "digest": str(a["digest"])} for a in adapters]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the record of a merge ({type(error).__name__}: {error})") from None
