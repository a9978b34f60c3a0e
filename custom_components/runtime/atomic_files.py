"""Files and directories that are whole or absent, whatever stops the program."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Write a directory aside and rename it to `path` when the block succeeds, replacing what was there.

    Yields the directory to write into. If the block raises, nothing of it is left and `path` is as before.
    """
    aside = path.with_name(f".{path.name}.writing-{os.getpid()}")
    replaced = path.with_name(f".{path.name}.replaced-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                _flush_to_disk(file)
        if path.exists():
            path.rename(replaced)
        aside.rename(path)
        _flush_to_disk(path.parent)
    finally:
        if replaced.exists() and not path.exists():
            replaced.rename(path)  # stopped between the two renames
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file aside and rename it to `path` when the block succeeds, replacing what was there.

    Yields the path to write to. If the block raises, nothing of it is left and `path` is as before.
    """
    # note: without the process id in its name, what a killed process left is overwritten by the next.
    aside = path.with_name(f".{path.name}.writing")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        _flush_to_disk(aside)
        aside.replace(path)
        _flush_to_disk(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def sweep_unfinished(folder: Path) -> None:
    """Delete what killed processes left; call it only if no other process is writing there."""
    for leftover in (*folder.glob(".*.writing-*"), *folder.glob(".*.replaced-*")):
        shutil.rmtree(leftover, ignore_errors=True)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
