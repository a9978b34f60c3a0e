"""The file of a preference run that holds how the reference model rates its pairs."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from custom_components.runs.recognition import REFERENCE_DIGEST
from custom_components.runtime.atomic_files import whole_file
from custom_components.runtime.errors import UserError
from custom_components.runtime.terminal import say

# Raised whenever the same key would give other values.
_VERSION = 1

# The log-probabilities of each pair's chosen and rejected answer, in nats.
Ratings = Sequence[Sequence[float]]


@dataclass(frozen=True)
class ReferenceKey:
    """All that determines a reference model's ratings.

    Attributes:
        pairs: the digests of the pairs to train on and to validate on.
        base: a checksum of the frozen weights, as they are stored.
        dtype: of the computation.
        adapter: what the run begins from: "new", or a digest of the adapter's values.
    """

    pairs: list[str]
    base: str
    is_base_quantized: bool
    dtype: str
    max_seq_len: int | None
    prompt_template: str | dict[str, str]
    adapter: str
    variant: dict[str, bool]
    version: int = _VERSION


def read_reference(path: Path, key: ReferenceKey, *, resumes: bool) -> list[Ratings] | None:
    """Read the ratings of each data set, if the file has them for this key; else say why not and return None.

    Args:
        resumes: the run goes on: its reference cannot become another.

    Raises:
        UserError: the run goes on, and the file is of another adapter to begin from.
    """
    if not path.is_file():
        return None
    stored = _read(path)
    if stored is None:
        say(f"{path} is damaged: the reference's log-probabilities are computed anew")
        return None
    of_file, of_run = stored["key"], asdict(key)
    differing = [name for name in of_run if of_file.get(name) != of_run[name]]
    if resumes and ("adapter" in differing or "variant" in differing):
        raise UserError(
            f"init_adapter_from: the run's reference, in {str(path)!r}, is the adapter that the run began from, and "
            "the one named now is another; name that one, or begin a new run"
        )
    if differing:
        say(f"{path} is of another {' and '.join(differing)}: the reference's log-probabilities are computed anew")
        return None
    return stored["ratings"]


def write_reference(path: Path, key: ReferenceKey, ratings: Sequence[Ratings]) -> None:
    """Keep the ratings of each data set, whole or not at all."""
    content = {"key": asdict(key), "ratings": [[list(pair) for pair in of_set] for of_set in ratings]}
    with whole_file(path) as aside:
        aside.write_text(json.dumps({REFERENCE_DIGEST: _digest(content), **content}) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any] | None:
    """Read what :func:`write_reference` wrote; None if a byte of it has changed."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        digest = stored.pop(REFERENCE_DIGEST)
    except (OSError, ValueError, AttributeError, KeyError, RecursionError):
        return None
    return stored if digest == _digest(stored) else None


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
