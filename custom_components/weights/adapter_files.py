"""The tensors of an adapter's directory under the model's own names, whether PEFT or torchtune wrote it.

PEFT: adapter_model.safetensors or .bin, in Hugging Face's row order. torchtune (0.6.1,
training/checkpointing/_checkpointer.py, `save_checkpoint`): in every epoch_N/ adapter_model.pt, in older versions
adapter_N.pt, in its own names and row order, and beside it a conversion to PEFT's.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from custom_components.runtime.errors import UserError
from custom_components.runtime.terminal import say
from custom_components.weights.card import stated_steps
from custom_components.weights.checkpoint_files import StoredTensor, tensors_of_file
from custom_components.weights.directory_checks import check_adapter_directory
from custom_components.weights.names import interleave_rope_rows
from custom_components.weights.peft_format import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_PARAMETERS,
    TOKEN_ROWS,
    PeftConfig,
    is_unused,
    parameter_name,
    peft_key,
    read_peft_config,
)

WEIGHTS_NAME = "adapter_model.safetensors"

_PEFT_WEIGHTS_NAMES = (WEIGHTS_NAME, "adapter_model.bin")
_TUNE_NAME = re.compile(
    r"(?P<module>layers\.\d+\.attn\.(?:[qkv]|output)_proj|layers\.\d+\.mlp\.w[123]|output)"
    rf"\.(?:{'|'.join(map(re.escape, ADAPTER_PARAMETERS))})"
)


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter on disk; its values are read tensor by tensor.

    Attributes:
        directory: the adapter's.
        path: of the file of its tensors.
        tensors: by the name of the model's parameter. Where PEFT wrote some of the base's weights too, those as well.
        is_peft: the file has PEFT's names and Hugging Face's row order; otherwise torchtune's.
    """

    directory: Path
    path: Path
    config: PeftConfig
    tensors: dict[str, StoredTensor]
    is_peft: bool

    @property
    def modules(self) -> set[str]:
        """List the model's modules that have an adapter, by name."""
        return {match["module"] for name in self.tensors if (match := _TUNE_NAME.fullmatch(name))}

    @property
    def base_weights(self) -> list[str]:
        """List the base's weights that PEFT wrote too, by name; they have to be the checkpoint's."""
        return [name for name in self.tensors if not (_TUNE_NAME.fullmatch(name) or name.endswith(TOKEN_ROWS))]

    @property
    def use_dora(self) -> bool:
        """Tell whether this is DoRA, by the config or the tensors: torchtune's config does not say it."""
        return self.config.use_dora or any(name.endswith(".magnitude") for name in self.tensors)

    def key(self, name: str) -> str:
        """Give the name that a tensor has, or would have, in the file."""
        return peft_key(name) if self.is_peft else name

    def read(self, name: str, num_heads: int, num_kv_heads: int) -> Tensor:
        """Read a tensor in torchtune's row order."""
        tensor = self.tensors[name].read()
        num_rope_heads = rope_heads(name, num_heads, num_kv_heads) if self.is_peft else None
        return tensor if num_rope_heads is None else interleave_rope_rows(tensor, num_rope_heads)


def rope_heads(name: str, num_heads: int, num_kv_heads: int) -> int | None:
    """Give the number of heads by which a tensor's rows are permuted in PEFT's files; None: they are not permuted.

    Those of q's and k's weights are, and so those of B and of DoRA's magnitude. A's columns are the hidden state's.
    """
    if name.endswith(".lora_a.weight"):
        return None
    return num_heads if ".q_proj." in name else num_kv_heads if ".k_proj." in name else None


def open_adapter(adapter_dir: Path, key: str = "adapter_dir") -> StoredAdapter:
    """Open the adapter of a directory: once for a recipe, which hands it on. Only headers of tensors are read.

    Args:
        key: the setting that names the directory.

    Raises:
        UserError: there is none, it is damaged or of a kind that cannot be built here, or no Llama has its tensors.
    """
    check_adapter_directory(adapter_dir, key)
    config = read_peft_config(_directory_with_config(adapter_dir))
    files = _weights_files(adapter_dir)
    if not files:
        raise UserError(f"{adapter_dir}: has no {WEIGHTS_NAME}, adapter_model.bin or adapter_model.pt")
    adapter = _read(adapter_dir, files[0], config)
    if adapter.is_peft and adapter.use_dora and not config.use_dora:
        # torchtune's `tune_to_peft_adapter_weights` leaves the magnitudes of q and k in its own row order.
        if len(files) == 1:
            raise UserError(
                f"{adapter.path}: holds DoRA magnitudes, and {ADAPTER_CONFIG_NAME} does not say use_dora: this is "
                "torchtune's conversion, with the rows of the magnitudes in the wrong order; put its adapter_model.pt "
                "beside it"
            )
        adapter = _read(adapter_dir, files[-1], config)
    steps = stated_steps(adapter_dir)
    if steps is not None and not steps.is_finished:
        say(f"{adapter_dir}: its run was stopped at step {steps.num_steps} of {steps.num_planned_steps}")
    return adapter


def _directory_with_config(adapter_dir: Path) -> Path:
    if (adapter_dir / ADAPTER_CONFIG_NAME).is_file():
        return adapter_dir
    if _weights_files(adapter_dir):
        raise UserError(
            f"{adapter_dir}: holds an adapter without {ADAPTER_CONFIG_NAME}; write one with r, lora_alpha and "
            'target_modules, say {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}'
        )
    # Of our runs, of torchtune's and of transformers' Trainer.
    numbered = [path for pattern in ("epoch_*", "checkpoint-*") for path in _by_number(adapter_dir.glob(pattern))[::-1]]
    inside = [adapter_dir / "adapter", *numbered]
    found = next((str(path) for path in inside if (path / ADAPTER_CONFIG_NAME).is_file()), "the adapter/ of a run")
    raise UserError(f"adapter_dir: {str(adapter_dir)!r} has no {ADAPTER_CONFIG_NAME}; name {found}")


def _weights_files(adapter_dir: Path) -> list[Path]:
    """List the files of weights, the best first: where there are both, PEFT's was saved last."""
    peft_files = [adapter_dir / name for name in _PEFT_WEIGHTS_NAMES if (adapter_dir / name).is_file()]
    tune_files = [*_by_number(adapter_dir.glob("adapter_*.safetensors")), *_by_number(adapter_dir.glob("adapter_*.pt"))]
    return peft_files[:1] + [file for file in tune_files if file not in peft_files][-1:]


def _by_number(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: int((re.findall(r"\d+", path.name) or ["0"])[-1]))


def _read(adapter_dir: Path, path: Path, config: PeftConfig) -> StoredAdapter:
    stored = tensors_of_file(path)
    is_peft = not any(_TUNE_NAME.fullmatch(tensor.stored_name) for tensor in stored)
    tensors: dict[str, StoredTensor] = {}
    for tensor in stored:
        if is_unused(tensor.stored_name):
            continue
        name = parameter_name(tensor.stored_name) if is_peft else tensor.stored_name
        if name is None or not (is_peft or _TUNE_NAME.fullmatch(name)):
            raise UserError(f"{path}: {tensor.stored_name!r} has no place in a Llama's adapter{_trained_whole(config)}")
        if name in tensors and not _is_same_base_weight(name, tensor, tensors[name]):
            raise UserError(f"{path}: {tensor.stored_name!r} and {tensors[name].stored_name!r} are the same tensor")
        tensors[name] = tensor
    if not any(_TUNE_NAME.fullmatch(name) for name in tensors):
        raise UserError(f"{path}: holds no tensors; was the adapter saved whole?")
    return StoredAdapter(adapter_dir, path, config, tensors, is_peft)


def _trained_whole(config: PeftConfig) -> str:
    if not config.modules_to_save:
        return ""
    return f"; {config.path} says modules_to_save {config.modules_to_save}, and whole trained modules cannot be loaded"


def _is_same_base_weight(name: str, tensor: StoredTensor, other: StoredTensor) -> bool:
    """Tell whether two entries are one of the base's weights, which PEFT stores twice in some cases."""
    return _TUNE_NAME.fullmatch(name) is None and torch.equal(tensor.read(), other.read())
