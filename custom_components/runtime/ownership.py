"""Recognising files that this project wrote, by name and content: only these are ever deleted or replaced."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Union

Recognises = Callable[[Path], bool]


@dataclass(frozen=True)
class OwnDirectory:
    """A directory that this project writes.

    Attributes:
        entries: by a regular expression for the whole name, how a file is recognised, or what a directory holds; in the
            order in which they are deleted.
    """

    entries: Mapping[str, Union[Recognises, "OwnDirectory"]]

    @property
    def directories(self) -> dict[str, "OwnDirectory"]:
        """The directories in it, by the expressions for their names."""
        return {name: own for name, own in self.entries.items() if isinstance(own, OwnDirectory)}

    def first_foreign(self, path: Path) -> Path | None:
        """Find what is not ours at a path: something in the directory, or all of it, a link for example."""
        if path.is_symlink() or not path.is_dir():
            return path
        for entry in sorted(path.iterdir()):
            own = next((own for name, own in self.entries.items() if re.fullmatch(name, entry.name)), None)
            foreign = entry if own is None else first_foreign(entry, own)
            if foreign is not None:
                return foreign
        return None

    def remove(self, path: Path, *, by_name: bool = False) -> None:
        """Delete what is ours; the rest stays, and with it the directory.

        Args:
            by_name: whatever the content, as where a killed process left half a file.
        """
        if path.is_symlink() or not path.is_dir():
            return
        for entry, own in self._entries_of(path):
            if isinstance(own, OwnDirectory):
                own.remove(entry, by_name=by_name)
            elif by_name or own(entry):
                entry.unlink()
        if not any(path.iterdir()):
            path.rmdir()

    def _entries_of(self, path: Path) -> Iterator[tuple[Path, "Recognises | OwnDirectory"]]:
        """List the entries of our names and kinds."""
        for name, own in self.entries.items():
            for entry in [entry for entry in path.iterdir() if re.fullmatch(name, entry.name)]:
                has_kind = entry.is_dir() if isinstance(own, OwnDirectory) else entry.is_file()
                if has_kind and not entry.is_symlink():
                    yield entry, own


def first_foreign(path: Path, own: Recognises | OwnDirectory) -> Path | None:
    """Find what is not ours at a path; None: it is ours as a whole."""
    if isinstance(own, OwnDirectory):
        return own.first_foreign(path)
    return None if path.is_file() and not path.is_symlink() and own(path) else path


def with_names_of(directory: Path) -> OwnDirectory:
    """Describe a directory of the same names as another, whatever their content."""
    return OwnDirectory(
        {
            re.escape(entry.name): with_names_of(entry) if entry.is_dir() else (lambda path: True)
            for entry in directory.iterdir()
        }
    )
