"""Writing tensors as safetensors files, one tensor in memory at a time.

Format: huggingface/safetensors, README.md, section "Format": 8 bytes with the header's length, the header as JSON, the
tensors' bytes end to end. Shard names and index: transformers' `save_pretrained`.
"""

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

DEFAULT_MAX_SHARD_BYTES = 5 * 10**9


def write_safetensors(
    directory: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> None:
    """Write model.safetensors, or several shards with their index.

    Args:
        tensors: in the order of `shapes`.
        shapes: the shape of every tensor by its name in the file: they make the headers, which come first.
        dtype: fp32, fp16 or bf16, that the tensors are cast to.
        max_shard_bytes: of a shard, unless a single tensor is larger.
    """
    shards = _planned_shards(shapes, dtype.itemsize, max_shard_bytes)
    remaining = iter(tensors)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        one_of_several = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file_name = "model.safetensors" if len(shards) == 1 else one_of_several
        with (directory / file_name).open("wb") as file:
            file.write(_header({name: shapes[name] for name in names}, dtype))
            for name in names:
                given_name, tensor = next(remaining)
                assert given_name == name and tuple(tensor.shape) == shapes[name], (given_name, name, tensor.shape)
                file.write(tensor.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data)
        weight_map |= dict.fromkeys(names, file_name)
    assert next(remaining, None) is None
    if len(shards) > 1:
        total_size = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _planned_shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int, max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name, shape in shapes.items():
        tensor_bytes = torch.Size(shape).numel() * itemsize
        if shards[-1] and shard_bytes + tensor_bytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += tensor_bytes
    return shards


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    # transformers refuses a file whose metadata does not say which framework wrote it.
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)  # the data begins at a multiple of 8 bytes
    return struct.pack("<Q", len(header)) + header
