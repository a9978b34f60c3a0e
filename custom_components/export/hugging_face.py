"""A Llama model as a Hugging Face directory, which transformers, vLLM and llama.cpp's converter load as it is."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtune.models.convert_weights import get_mapped_key

from custom_components.models.shapes import LlamaShape
from custom_components.runtime.errors import UserError
from custom_components.transforms.jinja_template import control_pieces_of, tokenizer_config
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.transforms.tokenizer_json import fast_tokenizer
from custom_components.weights.names import HUGGING_FACE_NAMES, halve_rope_rows
from custom_components.weights.safetensors_writing import DEFAULT_MAX_SHARD_BYTES, write_safetensors

_CONFIG_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def write_weights(
    directory: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    shape: LlamaShape,
    dtype: torch.dtype,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> None:
    """Write tensors of torchtune's names and row order under Hugging Face's, see :func:`write_safetensors`."""

    def in_hugging_face_order(name: str, tensor: Tensor) -> Tensor:
        if name.endswith("q_proj.weight"):
            return halve_rope_rows(tensor.to(dtype), shape.num_heads)
        if name.endswith("k_proj.weight"):
            return halve_rope_rows(tensor.to(dtype), shape.num_kv_heads)
        return tensor

    write_safetensors(
        directory,
        ((get_mapped_key(name, HUGGING_FACE_NAMES), in_hugging_face_order(name, tensor)) for name, tensor in tensors),
        {get_mapped_key(name, HUGGING_FACE_NAMES): tensor_shape for name, tensor_shape in shapes.items()},
        dtype,
        max_shard_bytes,
    )


def write_config(
    directory: Path,
    source_dir: Path,
    shape: LlamaShape,
    tokenizer: Llama2ChatTransform,
    dtype: torch.dtype,
) -> None:
    """Write config.json and generation_config.json: the source's, or made from the shape where Meta's format has none.

    Args:
        shape: of the model that is written, whose embeddings may be tied otherwise than the source's.
        tokenizer: its stop tokens are what generation ends at.
    """
    config = _read(source_dir / "config.json") or config_of_shape(shape, tokenizer.bos_id, tokenizer.eos_id)
    # transformers 5 reads and writes `dtype`, and still reads `torch_dtype`, the only one that version 4 knows.
    config["dtype" if "dtype" in config else "torch_dtype"] = _CONFIG_DTYPES[dtype]
    config["tie_word_embeddings"] = shape.tied_embeddings
    _write(directory / "config.json", config)
    generation_config = _read(source_dir / "generation_config.json") or {"bos_token_id": tokenizer.bos_id}
    stop_tokens = tokenizer.stop_tokens
    generation_config["eos_token_id"] = stop_tokens[0] if len(stop_tokens) == 1 else stop_tokens
    _write(directory / "generation_config.json", generation_config)


def write_tokenizer(directory: Path, tokenizer_model: Path, max_seq_len: int, template: str | None) -> None:
    """Write tokenizer.model, tokenizer.json and tokenizer_config.json.

    Args:
        tokenizer_model: the source's SentencePiece model.
        max_seq_len: the model's context, in tokens.
        template: the Jinja chat template, or None: none is written.
    """
    shutil.copyfile(tokenizer_model, directory / "tokenizer.model")
    fast = fast_tokenizer(tokenizer_model)
    if fast is not None:
        fast.save(str(directory / "tokenizer.json"))
    else:
        print(
            "warning: no tokenizer.json is written, for this tokenizer.model is no plain byte-pair encoding; what "
            "transformers makes of it may give other ids than training used"
        )
    config = tokenizer_config(control_pieces_of(tokenizer_model), max_seq_len, template, is_fast=fast is not None)
    _write(directory / "tokenizer_config.json", config)


def source_template(source_dir: Path) -> str | None:
    """The chat template that a checkpoint comes with, if any."""
    if (source_dir / "chat_template.jinja").exists():
        return (source_dir / "chat_template.jinja").read_text(encoding="utf-8")
    template = _read(source_dir / "tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else None


def config_of_shape(shape: LlamaShape, bos_id: int, eos_id: int) -> dict[str, Any]:
    """What config.json says of a model, as far as its shape and its tokenizer decide it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.embed_dim,
        "intermediate_size": shape.intermediate_dim,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": shape.max_seq_len,
        "rope_theta": shape.rope_base,
        "rms_norm_eps": shape.norm_eps,
        "hidden_act": "silu",
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
    }


def _read(path: Path) -> dict[str, Any]:
    """A JSON file's values; none where there is no such file."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); download the file again") from None


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
