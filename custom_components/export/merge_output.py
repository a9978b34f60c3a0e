"""Where a merged model is written: nothing else is overwritten, and there is room for it."""

import contextlib
import errno
import glob
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from custom_components.export.merge_record import is_merge
from custom_components.runtime.atomic_files import whole_directory
from custom_components.runtime.errors import UserError

# What tokenizer, configs and index may take beside the weights.
_NUM_BYTES_BESIDE_WEIGHTS = 64 * 2**20


def check_output_dir(output_dir: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse a directory whose writing would destroy something.

    Args:
        inputs: the directories that are read.
        overwrite: a merged model that lies there may be replaced.

    Raises:
        UserError: it is, holds or lies in an input, or it is not empty and no merge that may be replaced.
    """
    resolved = output_dir.resolve()
    for path in map(Path.resolve, inputs):
        if resolved == path or resolved in path.parents or path in resolved.parents:
            raise UserError(
                f"output_dir: {str(output_dir)!r} is, holds or lies in {str(path)!r}, which is read; name another"
            )
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir: {str(output_dir)!r} is a file; name a directory")
    if output_dir.exists() and any(output_dir.iterdir()):
        if not is_merge(output_dir):
            raise UserError(f"output_dir: {str(output_dir)!r} is not empty, and is no merged model; name another")
        if not overwrite:
            raise UserError(
                f"output_dir: {str(output_dir)!r} holds a merged model; name another, or set overwrite_output_dir=true"
            )


def restore_replaced(output_dir: Path) -> None:
    """Put back what a merge was killed while replacing, and delete what it had replaced already."""
    for replaced in output_dir.parent.glob(f".{glob.escape(output_dir.name)}.replaced-*"):
        if output_dir.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(output_dir)


def check_space(output_dir: Path, num_weight_bytes: int) -> None:
    """Refuse a disk that is too small, before anything is written. What would be replaced counts as still there.

    Raises:
        UserError: it is.
    """
    existing = next(parent for parent in (output_dir, *output_dir.resolve().parents) if parent.exists())
    needed, free = num_weight_bytes + _NUM_BYTES_BESIDE_WEIGHTS, shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"output_dir: the merged model needs {needed / 1e9:.1f} GB, the disk of {str(output_dir)!r} has "
            f"{free / 1e9:.1f} GB free; free some or name another disk"
        )


@contextlib.contextmanager
def merge_directory(output_dir: Path) -> Iterator[Path]:
    """Write a directory that is whole or not there, see :func:`whole_directory`.

    Raises:
        UserError: it cannot be written, or not any more.
    """
    try:
        # What a killed merge to the same directory left is as large as a model.
        for leftover in output_dir.parent.glob(f".{glob.escape(output_dir.name)}.writing-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with whole_directory(output_dir) as directory:
            yield directory
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
            raise
        raise UserError(
            f"output_dir: {str(output_dir)!r} cannot be written ({error.strerror}); free space, or name another"
        ) from None
