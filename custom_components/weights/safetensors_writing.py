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
    dtypes: Mapping[str, torch.dtype],
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> None:
    """Write model.safetensors, or several shards with their index.

    Args:
        tensors: in the order of `shapes`.
        shapes: the shape of every tensor by its name in the file: they make the headers, which come first.
        dtypes: fp32, fp16 or bf16, that each tensor is cast to.
        max_shard_bytes: of a shard, unless a single tensor is larger.
    """
    num_bytes = {name: torch.Size(shape).numel() * dtypes[name].itemsize for name, shape in shapes.items()}
    shards = _planned_shards(num_bytes, max_shard_bytes)
    remaining = iter(tensors)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        one_of_several = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file_name = "model.safetensors" if len(shards) == 1 else one_of_several
        with (directory / file_name).open("wb") as file:
            file.write(_header({name: shapes[name] for name in names}, dtypes))
            for name in names:
                given_name, tensor = next(remaining)
                assert given_name == name and tuple(tensor.shape) == shapes[name], (given_name, name, tensor.shape)
                file.write(tensor.to(dtypes[name]).contiguous().view(-1).view(torch.uint8).numpy().data)
        weight_map |= dict.fromkeys(names, file_name)
    assert next(remaining, None) is None
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(num_bytes.values())}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _planned_shards(num_bytes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name, tensor_bytes in num_bytes.items():
        if shards[-1] and shard_bytes + tensor_bytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += tensor_bytes
    return shards


def _header(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]) -> bytes:
    # transformers refuses a file whose metadata does not say which framework wrote it.
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtypes[name].itemsize
        entries[name] = {"dtype": _DTYPE_NAMES[dtypes[name]], "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)  # the data begins at a multiple of 8 bytes
    return struct.pack("<Q", len(header)) + header
