"""Where a merged model is written: nothing else is overwritten, and there is room for it."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from custom_components.export.merge_record import RECORD_NAME, merge_in
from custom_components.runtime.atomic_files import check_renames_directories, sweep_unfinished, whole_directory
from custom_components.runtime.disk_errors import disk_errors_of
from custom_components.runtime.errors import UserError
from custom_components.runtime.ownership import OwnDirectory

# What tokenizer, configs and index may take beside the weights.
_NUM_BYTES_BESIDE_WEIGHTS = 64 * 2**20
_ADVICE = "free space there, or name a directory on another disk"
# A protected disk, a file where a directory is needed, a directory that is a mount point.
_USERS_ERRORS = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EBUSY, errno.EXDEV)


# What a merge writes, by names: of one that was killed before it had written its record.
_FILES = OwnDirectory(
    dict.fromkeys(
        (
            r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json",
            r".+-(f16|q8_0|q[45]_k_m|lora)\.gguf|\..+\.gguf\.writing",
            r"(generation_|tokenizer_)?config\.json|tokenizer\.(model|json)|added_tokens\.json",
            r"prompt_format\.yaml|README\.md|Modelfile",
            re.escape(RECORD_NAME),
        ),
        lambda path: True,
    )
)


def check_output_dir(output_dir: Path, *, overwrite: bool) -> None:
    """Refuse a directory whose writing would destroy something; that it is none that is read is checked before.

    Args:
        overwrite: a merged model that is there may be replaced.

    Raises:
        UserError: it is a link, or it is not empty and not a merge that may be replaced, or not nothing but that.
    """
    if output_dir.is_symlink():
        raise UserError(
            f"output_dir: {str(output_dir)!r} is a link, and nothing is written in place of one; name "
            f"{os.path.realpath(output_dir)!r}"
        )
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir: {str(output_dir)!r} is a file; name a directory")
    if output_dir.exists() and any(output_dir.iterdir()):
        merge = merge_in(output_dir)
        if merge is None:
            raise UserError(f"output_dir: {str(output_dir)!r} is not empty, and is no merged model; name another")
        if not overwrite:
            raise UserError(
                f"output_dir: {str(output_dir)!r} holds a merged model; name another, or set overwrite_output_dir=true"
            )
        if (foreign := merge.first_foreign(output_dir)) is not None:
            raise UserError(
                f"output_dir: {str(foreign)!r} is not, as it is, what the merge wrote, and would be deleted; move it, "
                "or name another directory"
            )


def restore_replaced(output_dir: Path) -> None:
    """Restore the model that a killed merge was replacing; delete it if the replacement is complete."""
    sweep_unfinished(output_dir.parent, {re.escape(output_dir.name): _FILES})


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
        with disk_errors_of("output_dir", output_dir, _ADVICE):
            check_renames_directories(output_dir.parent)
    except OSError as error:
        raise UserError(
            f"output_dir: {str(output_dir)!r} cannot be written ({error.strerror}), as on file systems that rename no "
            "directories; name a directory on another disk"
        ) from None
    try:
        with (
            disk_errors_of("output_dir", output_dir, _ADVICE),
            whole_directory(output_dir, replaces=merge_in(output_dir) or OwnDirectory({})) as directory,
        ):
            yield directory
    except OSError as error:
        if error.errno not in _USERS_ERRORS:
            raise
        raise UserError(f"output_dir: {str(output_dir)!r} cannot be written ({error.strerror}); name another") from None
