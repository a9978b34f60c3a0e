"""A checkpoint directory of base weights: its model's shape, and its tensors under torchtune's names, read one by one.

Hugging Face: one or many safetensors, else .bin files. Meta: consolidated.*.pth, any number of shards.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from custom_components.models.shapes import LlamaShape, shape_and_config
from custom_components.runtime.errors import UserError
from custom_components.runtime.json_files import read_json_values
from custom_components.runtime.text_files import check_is_file
from custom_components.runtime.torch_files import load_torch_file
from custom_components.weights.card_metadata import names_no_base_model
from custom_components.weights.directory_checks import check_model_directory, check_not_quantized
from custom_components.weights.names import (
    TUNE_NAMES_OF_HUGGING_FACE,
    TUNE_NAMES_OF_META,
    interleave_rope_rows,
    translated_name,
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk, before it is read."""

    file: Path
    stored_name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class BaseCheckpoint:
    """A checkpoint directory of base weights. Each of its files is opened once, when it is first needed.

    Attributes:
        directory: in Hugging Face's or Meta's layout.
        shape: of the model, as config.json or params.json states it.
        config: all of config.json; empty in Meta's layout.
    """

    directory: Path
    shape: LlamaShape
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokenizer_model(self) -> Path:
        return self.directory / "tokenizer.model"

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Open every tensor, by torchtune's name: headers are read here, values by each one's `read()`.

        Raises:
            UserError: no weights, a shard of the index that is not there, a damaged file, a tensor no Llama has.
        """
        return _tensors_of_checkpoint(self.directory, self.shape)

    @cached_property
    def hub_name(self) -> str | None:
        """Find the name on the hub; None if it is not known.

        It is in a file that `tune download` writes, in the path of the hub's cache or in the clone of its repository.
        That of config.json may be the parent of a model trained further, so it counts only if the directory is named so
        too, or has a card that names no parent.
        """
        if name := _stated_text(self.directory / "original_repo_id.json", "repo_id"):
            return name
        for directory in (self.directory.absolute(), self.directory.resolve()):
            for part, next_part in itertools.pairwise(directory.parts):
                if next_part == "snapshots" and (found := re.fullmatch(r"models--(.+?)--(.+)", part)):
                    return "/".join(found.groups())
        if name := _cloned_repository(self.directory):
            return name
        name = self.config.get("_name_or_path")
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            return None
        is_named_so = Path(name).name == self.directory.absolute().name
        return name if is_named_so or names_no_base_model(self.directory) else None

    @property
    def name(self) -> str:
        """Give the name on the hub, else the directory, from the root: PEFT and transformers load it from anywhere.

        They take a relative one for a name on the hub where it does not exist.
        """
        return self.hub_name or str(self.directory.resolve())


def open_checkpoint(checkpoint_dir: Path) -> BaseCheckpoint:
    """Open a directory of base weights: once for a recipe, which hands it on.

    Raises:
        UserError: it is not the directory of a model, see :mod:`directory_checks`; or the model is quantized, or not a
            plain Llama.
    """
    check_model_directory(checkpoint_dir)
    shape, config = shape_and_config(checkpoint_dir, partial(check_not_quantized, checkpoint_dir))
    return BaseCheckpoint(checkpoint_dir, shape, config)


def _tensors_of_checkpoint(checkpoint_dir: Path, shape: LlamaShape) -> dict[str, StoredTensor]:
    if files := (
        _weight_files(checkpoint_dir, "model.safetensors.index.json", "*.safetensors")
        or _weight_files(checkpoint_dir, "pytorch_model.bin.index.json", "pytorch_model*.bin")
    ):
        tensors = [tensor for file in files for tensor in tensors_of_file(file)]
    elif files := sorted(checkpoint_dir.glob("consolidated.*.pth")):
        return _by_tune_name(_joined_meta_shards(files), TUNE_NAMES_OF_META)
    else:
        raise UserError(f"checkpoint_dir: no *.safetensors, *.bin or consolidated.*.pth in {str(checkpoint_dir)!r}")
    return {
        name: _interleaved(tensor, shape) if name.endswith(("q_proj.weight", "k_proj.weight")) else tensor
        for name, tensor in _by_tune_name(tensors, TUNE_NAMES_OF_HUGGING_FACE).items()
    }


def tensors_of_file(file: Path) -> list[StoredTensor]:
    """Open one safetensors file, or a pickle of named tensors.

    Raises:
        UserError: a damaged file, or a pickle of anything else.
    """
    return _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)


def _interleaved(tensor: StoredTensor, shape: LlamaShape) -> StoredTensor:
    num_heads = shape.num_heads if "q_proj" in tensor.stored_name else shape.num_kv_heads

    def read() -> Tensor:
        return interleave_rope_rows(tensor.read(), num_heads)

    return StoredTensor(tensor.file, tensor.stored_name, tensor.shape, read)


class _Index(BaseModel):
    """*.index.json: which file has a tensor, by the tensor's name."""

    model_config = ConfigDict(strict=True)

    weight_map: dict[str, str]


# How the names of files begin that may be beside a model.
_NO_MODEL = ("adapter_", "optimizer", "consolidated")


def _weight_files(checkpoint_dir: Path, index_name: str, pattern: str) -> list[Path]:
    index_path = checkpoint_dir / index_name
    whole = checkpoint_dir / index_name.removesuffix(".index.json")
    if not index_path.exists():
        # note: some repositories hold an adapter beside the model, its optimizer's state, or its weights as Meta's.
        # transformers reads the file of this name.
        beside = (path for path in checkpoint_dir.glob(pattern) if not path.name.startswith(_NO_MODEL))
        return [whole] if whole.exists() else sorted(beside)
    if whole.exists():
        raise UserError(
            f"checkpoint_dir: {str(checkpoint_dir)!r} holds two models, {whole.name} and the shards of {index_name}; "
            "transformers reads the first: delete the one that is not meant"
        )
    try:
        names = sorted(set(_Index.model_validate(read_json_values(index_path)).weight_map.values()))
    except (OSError, ValueError):
        raise UserError(f"{index_path}: not an index with a weight_map; download the file again") from None
    # Only files of the directory that was named: ../ and absolute paths lead elsewhere.
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise UserError(f"{index_path}: names the shard {outside[0]!r}, which is not in its own directory")
    missing = [name for name in names if not (checkpoint_dir / name).is_file()]
    if missing:
        raise UserError(
            f"{index_path}: names {len(missing)} of {len(names)} shards that are not there ({', '.join(missing)}); "
            "download them again"
        )
    return [checkpoint_dir / name for name in names]


def _safetensors(file: Path) -> list[StoredTensor]:
    try:
        check_is_file(file)
        # note: left open on purpose. The tensors are views of its memory map, read when `read` is called.
        handle = safe_open(file, framework="pt")
        return [
            StoredTensor(file, name, tuple(handle.get_slice(name).get_shape()), partial(handle.get_tensor, name))
            for name in handle.keys()  # noqa: SIM118 - not a mapping
        ]
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); download it again") from None


def _load_pickle(file: Path) -> dict[str, Tensor]:
    try:
        stored = load_torch_file(file, mmap=True)
    except ValueError as error:
        raise UserError(f"{file}: not a whole file of plain tensors ({error}); download it again") from None
    if not isinstance(stored, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in stored.items()
    ):
        raise UserError(f"{file}: holds other things than named tensors; name the file of a state dict")
    return stored


def _pickled(file: Path) -> list[StoredTensor]:
    return [
        StoredTensor(file, name, tuple(tensor.shape), partial(_identity, tensor))
        for name, tensor in _load_pickle(file).items()
    ]


def _identity(tensor: Tensor) -> Tensor:
    return tensor


# Which dimension Meta's model-parallel layers split (meta-llama/llama @689c7f2, model.py: ColumnParallelLinear 0,
# RowParallelLinear and ParallelEmbedding 1); norms are in every shard whole.
_META_SPLIT_DIMENSION = {
    **dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output"), 0),
    **dict.fromkeys(("wo", "w2", "tok_embeddings"), 1),
}


def _joined_meta_shards(files: list[Path]) -> list[StoredTensor]:
    shards = [_load_pickle(file) for file in files]
    joined = []
    for name, first in shards[0].items():
        dimension = _META_SPLIT_DIMENSION.get(name.rpartition(".")[0].rpartition(".")[2])
        if lacking := [str(file) for file, shard in zip(files, shards, strict=True) if name not in shard]:
            raise UserError(f"{lacking[0]}: has no {name!r}, which {files[0]} has; download it again")
        if dimension is None:
            joined.append(StoredTensor(files[0], name, tuple(first.shape), partial(_identity, first)))
            continue
        others = [[*shard[name].shape[:dimension], *shard[name].shape[dimension + 1 :]] for shard in shards]
        if first.ndim != 2 or any(other != others[0] for other in others):
            raise UserError(f"{files[0]}: {name!r} does not join with that of the other shards; download them again")
        shape = list(first.shape)
        shape[dimension] = sum(shard[name].shape[dimension] for shard in shards)
        read = partial(torch.cat, [shard[name] for shard in shards], dimension)
        joined.append(StoredTensor(files[0], name, tuple(shape), read))
    return joined


def _by_tune_name(tensors: Iterable[StoredTensor], names: Mapping[str, str | None]) -> dict[str, StoredTensor]:
    by_name: dict[str, StoredTensor] = {}
    unexpected = []
    for tensor in tensors:
        if tensor.stored_name == "rope.freqs" or tensor.stored_name.endswith("rotary_emb.inv_freq"):
            continue  # computed, not trained; old checkpoints store it
        tune_name = translated_name(tensor.stored_name, names)
        if tune_name is None:
            unexpected.append(tensor)
            continue
        if tune_name in by_name:
            raise UserError(
                f"{tensor.file}: holds {tensor.stored_name!r}, which {by_name[tune_name].file} holds too; delete the "
                "file that is not of this checkpoint"
            )
        by_name[tune_name] = tensor
    if unexpected:
        raise UserError(
            f"{unexpected[0].file}: holds {len(unexpected)} tensors that no Llama model has "
            f"(the first: {unexpected[0].stored_name!r}); is this another architecture, or an adapter?"
        )
    return by_name


def _cloned_repository(directory: Path) -> str | None:
    """Find the repository on the hub that a directory is a Git clone of; None: it is none."""
    try:
        text = (directory / ".git/config").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    found = re.search(r"(?m)^\s*url\s*=\s*\S*\b(?:huggingface\.co|hf\.co)[/:]([\w.-]+/[\w.-]+?)(?:\.git)?/?\s*$", text)
    return found[1] if found else None


def _stated_text(path: Path, key: str) -> str | None:
    """Read a text from a JSON file; None if there is none."""
    try:
        value = read_json_values(path)[key]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return value if isinstance(value, str) else None
