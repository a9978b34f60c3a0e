"""A Llama model as a Hugging Face directory, which transformers, vLLM and llama.cpp's converter load as it is."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtune.models.convert_weights import get_mapped_key

from custom_components.models.shapes import LlamaShape
from custom_components.runtime.json_files import read_json_object
from custom_components.runtime.terminal import say
from custom_components.weights.checkpoint_files import BaseCheckpoint
from custom_components.weights.names import HUGGING_FACE_NAMES, halve_rope_rows
from custom_components.weights.safetensors_writing import DEFAULT_MAX_SHARD_BYTES, write_safetensors

_CONFIG_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
# Settings of drawing the next token; transformers, generation/configuration_utils.py, GenerationConfig.validate.
_DRAWING = {"temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}


def write_weights(
    directory: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    shape: LlamaShape,
    dtypes: Mapping[str, torch.dtype],
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> None:
    """Write tensors of torchtune's names and row order under Hugging Face's, see :func:`write_safetensors`."""

    def in_hugging_face_order(name: str, tensor: Tensor) -> Tensor:
        if name.endswith("q_proj.weight"):
            return halve_rope_rows(tensor.to(dtypes[name]), shape.num_heads)
        if name.endswith("k_proj.weight"):
            return halve_rope_rows(tensor.to(dtypes[name]), shape.num_kv_heads)
        return tensor

    names = {name: get_mapped_key(name, HUGGING_FACE_NAMES) for name in shapes}
    write_safetensors(
        directory,
        ((names[name], in_hugging_face_order(name, tensor)) for name, tensor in tensors),
        {names[name]: tensor_shape for name, tensor_shape in shapes.items()},
        {names[name]: dtype for name, dtype in dtypes.items()},
        max_shard_bytes,
    )


def write_config(
    directory: Path,
    base: BaseCheckpoint,
    shape: LlamaShape,
    dtype: torch.dtype,
    *,
    bos_id: int | None,
    stop_ids: Sequence[int],
    pad_id: int | None,
) -> None:
    """Write config.json and generation_config.json: the base's, or made from the shape for Meta's layout.

    Args:
        shape: of the written model: its embeddings may be apart where the source's are tied.
        dtype: of its matrices.
        stop_ids: what generation ends at.
    """
    config = dict(base.config) or config_of_shape(shape, bos_id)
    # transformers 5 reads and writes `dtype`, and still reads `torch_dtype`, the only one that version 4 knows.
    config["dtype" if "dtype" in config else "torch_dtype"] = _CONFIG_DTYPES[dtype]
    config["tie_word_embeddings"] = shape.tied_embeddings
    config["vocab_size"] = shape.vocab_size  # with new tokens larger than the base's
    config.pop("_name_or_path", None)  # it names another model than this one
    stated = base.directory / "generation_config.json"
    generation_config = read_json_object(stated) if stated.exists() else {}
    generation_config = generation_config or {"bos_token_id": bos_id}
    # Llama 2 came so in 2023; Meta mended it in this way.
    if not generation_config.get("do_sample") and (drawing := sorted(_DRAWING & generation_config.keys())):
        generation_config["do_sample"] = True
        say(
            f"generation_config.json: do_sample is set to true; without it {', '.join(drawing)} has no effect, and "
            "transformers refuses to save the model again"
        )
    ids: dict[str, Any] = {"eos_token_id": stop_ids[0] if len(stop_ids) == 1 else list(stop_ids)}
    if pad_id is not None:
        ids["pad_token_id"] = pad_id
    _write(directory / "config.json", config | ids)
    _write(directory / "generation_config.json", generation_config | ids)


def config_of_shape(shape: LlamaShape, bos_id: int | None) -> dict[str, Any]:
    """Give the entries of config.json that follow from a model's shape and its tokenizer."""
    scaling = shape.rope_scaling
    rope: dict[str, Any] = {} if scaling is None else {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        rope |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
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
        **({"rope_scaling": rope} if rope else {}),
        **({"head_dim": shape.own_head_dim} if shape.own_head_dim else {}),
    }


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
