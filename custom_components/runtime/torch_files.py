"""Reading the files of torch.save: data only, and whatever is wrong with one is a ValueError."""

from pathlib import Path
from typing import Any

import torch

from custom_components.runtime.text_files import check_is_file


def load_torch_file(path: Path, *, map_location: str = "cpu", mmap: bool = False) -> Any:
    """Read a file of tensors and plain values.

    Args:
        mmap: leave tensors on the disk until they are used; otherwise the whole file is copied into memory.

    Raises:
        ValueError: it is not such a file; the message is one line.
    """
    try:
        check_is_file(path)
        # note: weights_only, or a downloaded file could run code.
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:  # noqa: BLE001 - the unpickler raises whatever a changed byte leads it to
        raise ValueError(str(error).splitlines()[0] if str(error).strip() else type(error).__name__) from None
