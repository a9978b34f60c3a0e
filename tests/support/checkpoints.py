"""Small random checkpoints made on the spot, in every layout that a base comes in."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from custom_components.weights.names import interleave_rope_rows
from tests.support.paths import TINY_TOKENIZER


def hugging_face_config(**changes: object) -> dict[str, Any]:
    """config.json of a Llama small enough to make in a test: grouped-query heads, untied embeddings."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "vocab_size": 1024,
        "torch_dtype": "float32",
    } | changes


def hugging_face_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random weights for a config.json, under Hugging Face's names."""
    generator = torch.Generator().manual_seed(seed)
    dim, hidden, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim") or dim // config["num_attention_heads"]
    query_dim, kv_dim = head_dim * config["num_attention_heads"], head_dim * config["num_key_value_heads"]

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    tensors = {"model.embed_tokens.weight": weight(vocab, dim), "model.norm.weight": 1 + weight(dim)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = weight(vocab, dim)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.self_attn.q_proj.weight": weight(query_dim, dim),
            f"{prefix}.self_attn.k_proj.weight": weight(kv_dim, dim),
            f"{prefix}.self_attn.v_proj.weight": weight(kv_dim, dim),
            f"{prefix}.self_attn.o_proj.weight": weight(dim, query_dim),
            f"{prefix}.mlp.gate_proj.weight": weight(hidden, dim),
            f"{prefix}.mlp.up_proj.weight": weight(hidden, dim),
            f"{prefix}.mlp.down_proj.weight": weight(dim, hidden),
            f"{prefix}.input_layernorm.weight": 1 + weight(dim),
            f"{prefix}.post_attention_layernorm.weight": 1 + weight(dim),
        }
    return tensors


def write_checkpoint(directory: Path, **changes: object) -> Path:
    """A small random checkpoint; keyword arguments change its config.json."""
    directory.mkdir()
    config = hugging_face_config(**changes)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(hugging_face_tensors(config), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "tokenizer.model").write_bytes(TINY_TOKENIZER.read_bytes())
    return directory


def split_into_shards(checkpoint: Path, suffix: str) -> None:
    """Rewrite a one-file checkpoint as two files with an index."""
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    for index in range(2):
        name = f"{stem}-{index + 1:05}-of-00002.{suffix}"
        part = dict(list(tensors.items())[index::2])
        if suffix == "bin":
            torch.save(part, checkpoint / name)
        else:
            save_file(part, checkpoint / name)
        weight_map |= dict.fromkeys(part, name)
    (checkpoint / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def as_meta_checkpoint(checkpoint: Path, num_shards: int) -> None:
    """Rewrite as Meta's consolidated shards: columns or rows of each weight, norms whole."""
    config = json.loads((checkpoint / "config.json").read_text())
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "config.json").unlink()
    params = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
        # int(2 * 4 * 64 / 3) = 170, rounded up to a multiple of 128 is 256
        "multiple_of": 128,
    }
    (checkpoint / "params.json").write_text(json.dumps(params))
    names: dict[str, tuple[str, int | None]] = {
        "self_attn.q_proj": ("attention.wq", 0),
        "self_attn.k_proj": ("attention.wk", 0),
        "self_attn.v_proj": ("attention.wv", 0),
        "self_attn.o_proj": ("attention.wo", 1),
        "mlp.gate_proj": ("feed_forward.w1", 0),
        "mlp.down_proj": ("feed_forward.w2", 1),
        "mlp.up_proj": ("feed_forward.w3", 0),
        "input_layernorm": ("attention_norm", None),
        "post_attention_layernorm": ("ffn_norm", None),
        "model.embed_tokens": ("tok_embeddings", 1),
        "model.norm": ("norm", None),
        "lm_head": ("output", 0),
    }
    shards = [{"rope.freqs": torch.zeros(1)} for _ in range(num_shards)]
    for name, tensor in tensors.items():
        hf_part = next(part for part in names if part in name)
        meta_part, dimension = names[hf_part]
        if "q_proj" in name or "k_proj" in name:
            heads = config["num_attention_heads"] if "q_proj" in name else config["num_key_value_heads"]
            tensor = interleave_rope_rows(tensor, heads)
        meta_name = name.replace(hf_part, meta_part).removeprefix("model.")
        parts = [tensor] * num_shards if dimension is None else tensor.chunk(num_shards, dimension)
        for shard, part in zip(shards, parts, strict=True):
            shard[meta_name] = part.clone()
    for index, shard in enumerate(shards):
        torch.save(shard, checkpoint / f"consolidated.{index:02}.pth")
