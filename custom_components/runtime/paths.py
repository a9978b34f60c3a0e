"""Resolving and comparing paths, with links, `..` and `~` in them."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path


def real_path(path: str | Path) -> Path:
    """Resolve `~`, `..` and links; the path need not exist."""
    # note: not Path.resolve, which raises where links run in a circle.
    return Path(os.path.realpath(os.path.expanduser(path)))  # noqa: PTH111


def is_or_holds(folder: str | Path, path: str | Path) -> bool:
    """Say whether `path` is `folder` or is inside it: where it is written, or where its links lead."""
    real_folder = real_path(folder)
    return any(_is_same(place, real_folder) for path in _places(path) for place in (path, *path.parents))


def named_files(text: str) -> list[Path]:
    """List the files that a text names: one by its path, or those that a glob such as `data/**.jsonl` matches.

    A folder names none, and neither does a path where nothing is.
    """
    path = os.path.expanduser(text)  # noqa: PTH111
    if os.path.exists(path):  # noqa: PTH110
        return [] if os.path.isdir(path) else [Path(path)]  # noqa: PTH112
    # note: Path.glob raises on 'data/**.jsonl'.
    names = glob.glob(path, recursive=True) if glob.has_magic(text) else []  # noqa: PTH207
    return sorted(Path(name) for name in names if os.path.isfile(name))  # noqa: PTH113


def _places(path: str | Path) -> Iterator[Path]:
    yield real_path(path)
    written = Path(os.path.expanduser(path))  # noqa: PTH111
    if written.name not in ("", ".."):
        yield real_path(written.parent) / written.name


def _is_same(path: Path, other: Path) -> bool:
    """Compare by name, and by what is there: a file system may ignore case, or be mounted twice."""
    try:
        return path == other or path.samefile(other)
    except OSError:
        return False
