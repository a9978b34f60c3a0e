"""Tokenized rows of local files, kept across runs."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from custom_components.runtime.atomic_files import whole_directory
from custom_components.runtime.errors import UserError
from custom_components.runtime.json_files import read_json_values
from custom_components.runtime.private_files import make_private, make_private_directory
from custom_components.runtime.terminal import say

# Part of every key: raise it whenever the same inputs would give other tokens or other arrays.
_VERSION = 8
_SUMMARY_NAME, _DIGESTS_NAME = "summary.json", "digests.json"


class TokenCache:
    """Keeps one source's tokens, keyed by the content of its files and by everything else that determines them.

    Args:
        cache_dir: the folder of all caches; None: nothing is kept.
        files: the source's; a data set on the hub has none here, and is not kept.
        decisive: everything else that determines the tokens, as JSON values.

    Raises:
        UserError: a file cannot be read.
    """

    def __init__(self, cache_dir: str | Path | None, files: Sequence[Path], decisive: Sequence[Any]) -> None:
        self._directory: Path | None = None
        if cache_dir is not None and files:
            digest = hashlib.sha256(json.dumps([_VERSION, *decisive], sort_keys=True).encode())
            for file in files:
                digest.update(file.suffix.encode())
                try:
                    with file.open("rb") as content:
                        digest.update(hashlib.file_digest(content, "sha256").digest())
                except OSError as error:
                    raise UserError(f"dataset.source: {str(file)!r} cannot be read ({error.strerror})") from None
            self._directory = Path(cache_dir).expanduser() / "tokens" / digest.hexdigest()[:32]

    def load(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Load the arrays and counts stored before, if any."""
        if self._directory is None or not self._directory.is_dir():
            return None
        try:
            digests = read_json_values(self._directory / _DIGESTS_NAME)
            files = {path.name: path for path in self._directory.iterdir() if path.name in digests}
            # The size first: it takes no time to compare.
            are_whole = digests.keys() == files.keys() and all(
                digests[name].partition(":")[0] == str(path.stat().st_size) and digests[name] == _file_digest(path)
                for name, path in files.items()
            )
            if are_whole:
                # note: not np.load, which takes zip files as well.
                arrays: dict[str, np.ndarray] = {
                    path.stem: open_memmap(path, mode="r") for path in files.values() if path.suffix == ".npy"
                }
                return arrays, json.loads(files[_SUMMARY_NAME].read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
        say(f"cache_dir: the tokens in {str(self._directory)!r} are damaged: they are made again")
        return None

    def store(self, arrays: dict[str, np.ndarray], counts: dict[str, Any]) -> None:
        """Keep arrays and counts; if the folder cannot be written, nothing is kept and the run continues."""
        if self._directory is None:
            return
        try:
            make_private_directory(self._directory.parent)
            with whole_directory(self._directory) as directory:
                make_private_directory(directory)
                for name, values in arrays.items():
                    np.save(directory / f"{name}.npy", values)
                (directory / _SUMMARY_NAME).write_text(json.dumps(counts), encoding="utf-8")
                digests = {path.name: _file_digest(path) for path in directory.iterdir()}
                (directory / _DIGESTS_NAME).write_text(json.dumps(digests), encoding="utf-8")
                for file in directory.iterdir():
                    make_private(file)
        except (OSError, UserError) as error:
            reason = error.strerror or error if isinstance(error, OSError) else error
            say(f"cache_dir: the tokens are not kept, {str(self._directory)!r} cannot be written ({reason})")


def _file_digest(path: Path) -> str:
    with path.open("rb") as content:
        return f"{path.stat().st_size}:{hashlib.file_digest(content, 'sha256').hexdigest()}"
