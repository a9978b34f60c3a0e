"""The file that `output_file` names, where an earlier one of the same kind may be replaced."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from custom_components.runtime.atomic_files import whole_file
from custom_components.runtime.disk_errors import disk_errors_of
from custom_components.runtime.errors import UserError
from custom_components.runtime.ownership import Recognises


@contextlib.contextmanager
def replaced_file(path: Path, is_ours: Recognises, kind: str) -> Iterator[Path]:
    """Write a file aside and rename it to `path` when the block succeeds; yields the path to write to.

    Args:
        is_ours: recognises an earlier file, which is replaced.
        kind: what such a file is, in an error.

    Raises:
        UserError: nothing can be written there, or something else is there; this is checked before the block begins.
    """
    _check_no_other_file(path, is_ours, kind)
    with contextlib.ExitStack() as stack:
        stack.enter_context(disk_errors_of("output_file", path, "free space there, or name a file on another disk"))
        try:
            aside = stack.enter_context(whole_file(path))
            aside.touch()
        except OSError as error:
            raise UserError(
                f"output_file: {str(path)!r} cannot be written ({error.strerror}); name another file"
            ) from None
        yield aside
        _check_no_other_file(path, is_ours, kind)


def _check_no_other_file(path: Path, is_ours: Recognises, kind: str) -> None:
    if path.is_dir():
        raise UserError(f"output_file: {str(path)!r} cannot be written (it is a directory); name a file")
    if os.path.lexists(path) and (path.is_symlink() or not is_ours(path)):
        raise UserError(
            f"output_file: {str(path)!r} exists and is not {kind}, which could be replaced; "
            "delete it or name another file"
        )
