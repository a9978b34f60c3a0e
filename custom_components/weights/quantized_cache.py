"""A quantized base, kept across runs: a second start reads a quarter or half of the bytes and quantizes nothing."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from custom_components.models import quantization
from custom_components.models.quantization import Quantization
from custom_components.runtime.atomic_files import whole_file
from custom_components.runtime.private_files import make_private, make_private_directory
from custom_components.runtime.terminal import say
from custom_components.weights.checkpoint_files import BaseCheckpoint

# Part of every key: raised whenever the same checkpoint would give other values.
_VERSION = 2
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth")
# The key of the metadata with the digest of each tensor.
_DIGESTS = "digests"


class QuantizedCache:
    """The place of one checkpoint's quantized weights.

    The key is the format, the model's shape, which decides the order of rows, and of each file that may hold weights
    the path, size, inode and times of change. The time of a status change cannot be set back, as `cp -p` and
    `rsync -t` set the other one back; hashing all of the content would take as long as the cache saves.

    Args:
        cache_dir: the folder of all caches.
    """

    def __init__(self, cache_dir: Path, base: BaseCheckpoint, format: Quantization = "nf4") -> None:
        self._format = format
        digest = hashlib.sha256(f"{_VERSION} {'' if format == 'nf4' else f'{format} '}{base.shape}".encode())
        weight_files = [file for suffix in WEIGHT_SUFFIXES for file in base.directory.glob(f"*{suffix}")]
        for file in sorted(weight_files):
            status = file.stat()
            times = (status.st_mtime_ns, status.st_ctime_ns)
            digest.update(json.dumps([str(file.resolve()), status.st_size, status.st_ino, *times]).encode())
        self.path = cache_dir / "quantized" / f"{digest.hexdigest()[:32]}.safetensors"

    def weights(
        self, shapes: Mapping[str, torch.Size], dtype: torch.dtype, device: torch.device
    ) -> "CachedWeights | None":
        """Open the stored weights; None if they are not there or not whole: they are then made again."""
        if not self.path.exists():
            return None
        try:
            stored = CachedWeights(self.path, self._format, dtype, device)
            if all(stored.has(name, shape) for name, shape in shapes.items()):
                return stored
        except (SafetensorError, OSError, ValueError):
            pass
        self.say_damaged()
        return None

    def say_damaged(self) -> None:
        say(f"quantized_cache: {str(self.path)!r} is damaged: the base is quantized again")

    def store(self, weights: Mapping[str, Tensor]) -> None:
        """Keep weights; if the folder cannot be written, nothing is kept and the run continues."""
        tensors = {
            f"{name}.{index}": tensor.cpu()
            for name, weight in weights.items()
            for index, tensor in enumerate(quantization.stored_tensors(weight))
        }
        try:
            make_private_directory(self.path.parent)
            with whole_file(self.path) as path:
                digests = {name: _digest(tensor) for name, tensor in tensors.items()}
                save_file(tensors, path, {_DIGESTS: json.dumps(digests)})
                make_private(path)
        except (OSError, SafetensorError) as error:
            say(f"quantized_cache: not kept, {str(self.path)!r} cannot be written ({error})")


class CachedWeights:
    """The weights of a cache file, read one at a time.

    Raises:
        SafetensorError, OSError, ValueError: it is not a file that :class:`QuantizedCache` has stored.
    """

    def __init__(self, path: Path, format: Quantization, dtype: torch.dtype, device: torch.device) -> None:
        self._indices = range(quantization.num_stored_tensors(format))
        self._format = format
        self._handle = safe_open(path, framework="pt")
        self._names = set(self._handle.keys())
        self._digests = json.loads((self._handle.metadata() or {}).get(_DIGESTS, "null"))
        if not isinstance(self._digests, dict):
            raise ValueError(path)
        self._dtype = dtype
        self._device = device

    def has(self, name: str, shape: torch.Size) -> bool:
        if not {f"{name}.{index}" for index in self._indices} <= self._names & self._digests.keys():
            return False
        codes = quantization.stored_tensors(quantization.empty(shape, self._format, self._dtype, torch.device("meta")))
        return self._handle.get_slice(f"{name}.0").get_shape() == list(codes[0].shape)

    def read(self, name: str, shape: torch.Size) -> Tensor | None:
        """Read one weight, as a copy: a view of the file's memory map would change with the file.

        Returns:
            None: its bytes are not those that were stored.
        """
        names = [f"{name}.{index}" for index in self._indices]
        tensors = [self._handle.get_tensor(name).clone() for name in names]
        if [_digest(tensor) for tensor in tensors] != [self._digests[name] for name in names]:
            return None
        return quantization.from_stored_tensors([tensor.to(self._device) for tensor in tensors], shape, self._dtype)


def _digest(tensor: Tensor) -> str:
    """Hash a tensor's values, shape and dtype; ten times as fast as a disk reads them."""
    digest = xxhash.xxh3_128(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
