"""A base in NF4, kept across runs: a second start reads a quarter of the bytes and quantizes nothing."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchao.dtypes.nf4tensor import NF4Tensor

from custom_components.models import nf4
from custom_components.runtime.atomic_files import whole_file
from custom_components.weights.checkpoint_files import BaseCheckpoint

# Part of every key: raised whenever the same checkpoint would give other values.
_VERSION = 1
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth")
_SAMPLE_BYTES, _BYTES_BETWEEN_SAMPLES = 2**12, 2**22


class QuantizedCache:
    """The place of one checkpoint's quantized weights.

    The key is the model's shape, which decides the order of rows, and the names, sizes and times of change of the files
    that may hold weights, and samples of their content: hashing all of it would take as long as the cache saves.

    Args:
        cache_dir: the folder of all caches.
    """

    def __init__(self, cache_dir: Path, base: BaseCheckpoint) -> None:
        digest = hashlib.sha256(f"{_VERSION} {base.shape}".encode())
        weight_files = [file for suffix in WEIGHT_SUFFIXES for file in base.directory.glob(f"*{suffix}")]
        for file in sorted(weight_files):
            status = file.stat()
            digest.update(json.dumps([file.name, status.st_size, status.st_mtime_ns]).encode())
            with file.open("rb") as content:
                for start in range(0, status.st_size, _BYTES_BETWEEN_SAMPLES):
                    content.seek(start)
                    digest.update(content.read(_SAMPLE_BYTES))
        self.path = cache_dir / "quantized" / f"{digest.hexdigest()[:32]}.safetensors"

    def weights(
        self, shapes: Mapping[str, torch.Size], dtype: torch.dtype, device: torch.device
    ) -> "CachedWeights | None":
        """Open the stored weights; None if they are not there or not whole: they are then made again."""
        try:
            stored = CachedWeights(self.path, dtype, device)
        except (SafetensorError, OSError):
            return None
        return stored if all(stored.has(name, shape) for name, shape in shapes.items()) else None

    def store(self, weights: Mapping[str, NF4Tensor]) -> None:
        """Keep weights; if the folder cannot be written, nothing is kept and the run continues."""
        tensors = {
            f"{name}.{index}": tensor.cpu()
            for name, weight in weights.items()
            for index, tensor in enumerate(nf4.stored_tensors(weight))
        }
        try:
            with whole_file(self.path) as path:
                save_file(tensors, path)
        except (OSError, SafetensorError) as error:
            print(f"quantized_cache: not kept, {str(self.path)!r} cannot be written ({error})")


class CachedWeights:
    """The weights of a cache file, read one at a time."""

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._handle = safe_open(path, framework="pt")
        self._names = set(self._handle.keys())
        self._dtype = dtype
        self._device = device

    def has(self, name: str, shape: torch.Size) -> bool:
        if f"{name}.0" not in self._names:
            return False
        return self._handle.get_slice(f"{name}.0").get_shape() == [shape.numel() // 2]

    def read(self, name: str, shape: torch.Size) -> NF4Tensor:
        """Read one weight, as a copy: a view of the file's memory map would change with the file."""
        tensors: list[Tensor] = [self._handle.get_tensor(f"{name}.{index}") for index in range(4)]
        return nf4.from_stored_tensors([tensor.to(self._device, copy=True) for tensor in tensors], shape, self._dtype)
