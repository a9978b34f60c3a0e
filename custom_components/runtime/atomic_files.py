"""Files and directories that are whole or absent, whatever stops the program."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from custom_components.runtime.errors import UserError
from custom_components.runtime.ownership import OwnDirectory, with_names_of


@contextlib.contextmanager
def whole_directory(path: Path, replaces: OwnDirectory | None = None) -> Iterator[Path]:
    """Write a directory aside and rename it to `path` when the block succeeds.

    Yields the directory to write into. If the block raises, nothing of it is left and `path` is as before.

    Args:
        replaces: what may be at `path`; None: files of the names that are written.

    Raises:
        UserError: something else is there.
    """
    aside = path.with_name(f".{path.name}.writing-{os.getpid()}")
    replaced = path.with_name(f".{path.name}.replaced-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    own = replaces
    try:
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                _flush_to_disk(file)
        own = own or with_names_of(aside)
        if os.path.lexists(path):
            check_replaceable(path, own)
            path.rename(replaced)
        aside.rename(path)
        _flush_to_disk(path.parent)
    finally:
        if replaced.exists() and not path.exists():
            replaced.rename(path)  # stopped between the two renames
        shutil.rmtree(aside, ignore_errors=True)
        if own is not None and replaced.exists():
            with contextlib.suppress(OSError):
                replaced.rename(aside)  # killed while it is removed, half of it must never be put back
                own.remove(aside, by_name=True)


def check_renames_directories(folder: Path) -> None:
    """Try on a small directory what :func:`whole_directory` does in `folder` when all is written.

    Raises:
        OSError: its file system cannot.
    """
    before, after = (folder / f".trial-{os.getpid()}{end}" for end in ("", "-renamed"))
    try:
        before.mkdir(parents=True)
        (before / "file").touch()  # note: gcsfuse renames empty ones
        before.rename(after)
    finally:
        for path in (before, after):
            shutil.rmtree(path, ignore_errors=True)


def check_replaceable(path: Path, own: OwnDirectory) -> None:
    """Refuse to replace a directory that holds something else.

    Raises:
        UserError: it does.
    """
    if (foreign := own.first_foreign(path)) is not None:
        raise UserError(f"{str(foreign)!r} is in the way of what is written, and was written by others; move it away")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file aside and rename it to `path` when the block succeeds, replacing what was there.

    Yields the path to write to. If the block raises, nothing of it is left and `path` is as before.

    Raises:
        FileExistsError: there is a link.
    """
    if path.is_symlink():
        raise FileExistsError(errno.EEXIST, "it is a link", str(path))
    # note: without the process id in its name, what a killed process left is overwritten by the next.
    aside = path.with_name(f".{path.name}.writing")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside.unlink(missing_ok=True)  # it may be a link
    try:
        yield aside
        _flush_to_disk(aside)
        aside.replace(path)
        _flush_to_disk(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def sweep_unfinished(folder: Path, names: Mapping[str, OwnDirectory]) -> None:
    """Delete what killed processes left aside, and put back what they had not replaced yet.

    Only where no other process is writing.

    Args:
        names: what each of our directories holds, by a regular expression for its name.
    """
    for name, own in names.items():
        for entry in list(folder.iterdir()) if folder.is_dir() else []:
            match = re.fullmatch(rf"\.(?P<name>{name})\.(?P<state>writing|replaced)-\d+", entry.name)
            if match is None or entry.is_symlink() or not entry.is_dir():
                continue
            if match["state"] == "replaced" and not os.path.lexists(folder / match["name"]):
                entry.rename(folder / match["name"])
            else:
                removed = entry.with_name(entry.name.replace(".replaced-", ".writing-"))
                entry.rename(removed)  # see above
                # What is written in it may have been aside too: the adapter of a checkpoint.
                sweep_unfinished(removed, own.directories)
                own.remove(removed, by_name=True)
                if removed.exists():
                    removed.rename(entry)  # it holds what others put there


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems of FUSE cannot, directories above all: the rename still makes files whole for readers.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)
