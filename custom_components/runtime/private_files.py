"""Files for the user alone: caches keep people's conversations."""

import contextlib
from pathlib import Path


def make_private_directory(path: Path) -> None:
    """Make a directory that nobody else can look into; where a file system has no such rights, an ordinary one."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        path.chmod(0o700)


def make_private(file: Path) -> None:
    """Let nobody else read a file, where the file system has such rights."""
    with contextlib.suppress(OSError):
        file.chmod(0o600)
