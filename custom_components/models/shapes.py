"""The sizes of Llama-architecture models, by name and from a checkpoint's own config."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from custom_components.runtime.errors import UserError
from custom_components.runtime.json_files import read_json_object


@dataclass(frozen=True)
class LlamaShape:
    """The sizes and constants in which Llama-architecture models differ.

    Attributes:
        vocab_size: rows of the embedding.
        num_kv_heads: key/value heads; fewer than `num_heads` is grouped-query attention.
        intermediate_dim: width of the feed-forward.
        max_seq_len: the context, in tokens.
        rope_base: base of the rotary frequencies (`rope_theta`).
        tied_embeddings: the output head is the embedding's weight.
    """

    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    embed_dim: int
    intermediate_dim: int
    max_seq_len: int
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    tied_embeddings: bool = False

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads


# Llama 2: Touvron et al. 2023, arXiv 2307.09288, table 1 and appendix A.2.1; intermediate sizes and epsilon from the
# config.json of meta-llama/Llama-2-{7b,13b,70b}-hf. The others from the config.json of their repositories.
LLAMA2_7B = LlamaShape(32_000, 32, 32, 32, 4096, 11_008, 4096)
LLAMA2_13B = LlamaShape(32_000, 40, 40, 40, 5120, 13_824, 4096)
LLAMA2_70B = LlamaShape(32_000, 80, 64, 8, 8192, 28_672, 4096)
CODE_LLAMA2_7B = LlamaShape(32_016, 32, 32, 32, 4096, 11_008, 16_384, rope_base=1_000_000.0)
OPEN_LLAMA_3B = LlamaShape(32_000, 26, 32, 32, 3200, 8640, 2048, norm_eps=1e-6)
TINYLLAMA_1B = LlamaShape(32_000, 22, 32, 4, 2048, 5632, 2048)


def shape_from_checkpoint(checkpoint_dir: Path) -> LlamaShape:
    """Read the shape that a checkpoint directory states, see :func:`shape_and_config`."""
    return shape_and_config(checkpoint_dir)[0]


def shape_and_config(checkpoint_dir: Path) -> tuple[LlamaShape, dict[str, Any]]:
    """Read the shape that a checkpoint states, and all of its config.json; Meta's params.json gives the shape only.

    Raises:
        UserError: there is no such directory or no config in it, or it is not a plain Llama; it names what differs.
    """
    if not checkpoint_dir.is_dir():
        raise UserError(
            f"checkpoint_dir: {str(checkpoint_dir)!r} is not a directory; download a model with "
            f"`tune download REPOSITORY --output-dir {checkpoint_dir} --ignore-patterns '*.bin'`"
        )
    if (path := checkpoint_dir / "config.json").is_file():
        config = read_json_object(path)
        return _shape_from_hugging_face(config, path), config
    if (path := checkpoint_dir / "params.json").is_file():
        return _shape_from_meta(read_json_object(path), path), {}
    raise UserError(
        f"checkpoint_dir: {str(checkpoint_dir)!r} has neither config.json nor params.json; is the download whole?"
    )


def _shape_from_hugging_face(config: dict[str, Any], path: Path) -> LlamaShape:
    # transformers 5 writes rope_parameters where 4 wrote rope_theta and rope_scaling.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    # At a factor of 1 these leave every frequency as it is; transformers, modeling_rope_utils.py.
    scales_rope = not (rope_type in ("linear", "dynamic", "llama3") and rope.get("factor") == 1)
    refusals = {
        "model_type": config.get("model_type") not in ("llama", None) and config.get("model_type"),
        "hidden_act": config.get("hidden_act", "silu") != "silu" and config.get("hidden_act"),
        "attention_bias": config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
        "sliding_window": config.get("sliding_window"),
        "rope scaling": rope_type != "default" and scales_rope and rope_type,
        "partial_rotary_factor": rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0,
    }
    _refuse(refusals, path)
    try:
        num_heads, embed_dim = config["num_attention_heads"], config["hidden_size"]
        shape = LlamaShape(
            vocab_size=config["vocab_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            embed_dim=embed_dim,
            intermediate_dim=config["intermediate_size"],
            max_seq_len=config.get("max_position_embeddings", 2048),
            rope_base=rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            tied_embeddings=config.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise UserError(f"{path}: the key {error} is missing; is this a Llama checkpoint's config.json?") from None
    head_dim = config.get("head_dim") or shape.head_dim
    if head_dim * num_heads != embed_dim:
        raise UserError(
            f"{path}: head_dim {head_dim} times {num_heads} heads is not hidden_size {embed_dim}: not supported"
        )
    return shape


def _refuse(refusals: dict[str, Any], path: Path) -> None:
    for name, value in refusals.items():
        if value:
            raise UserError(
                f"{path}: {name} = {value!r} is not supported; this package trains plain Llama architectures"
            )


def _shape_from_meta(params: dict[str, Any], path: Path) -> LlamaShape:
    """Read Meta's params.json; for the feed-forward's width see meta-llama/llama @689c7f2, model.py, FeedForward."""
    # Llama 3.1's scaled frequencies, its quantized models; Mistral's names for windows and experts.
    keys = ("use_scaled_rope", "quantization_args", "lora_args", "sliding_window", "moe", "vision_chunk_size")
    _refuse({key: params.get(key) for key in keys}, path)
    try:
        embed_dim, num_heads = params["dim"], params["n_heads"]
        multiple_of = params.get("multiple_of", 256)
        intermediate_dim = int(params.get("ffn_dim_multiplier", 1.0) * int(2 * (4 * embed_dim) / 3))
        rounded_dim = multiple_of * ((intermediate_dim + multiple_of - 1) // multiple_of)
        # Llama 2's params.json has -1 and CodeLlama's has none, because the tokenizer states the size.
        vocab_size = params.get("vocab_size", -1)
        shape = LlamaShape(
            vocab_size=vocab_size if vocab_size > 0 else _num_rows_of_meta_embedding(path.parent),
            num_layers=params["n_layers"],
            num_heads=num_heads,
            num_kv_heads=params.get("n_kv_heads") or num_heads,
            embed_dim=embed_dim,
            intermediate_dim=params.get("hidden_dim") or rounded_dim,
            max_seq_len=LLAMA2_7B.max_seq_len,
            rope_base=params.get("rope_theta", 10_000.0),
            norm_eps=params["norm_eps"],
        )
    except KeyError as error:
        raise UserError(f"{path}: the key {error} is missing; is this Meta's params.json?") from None
    if params.get("head_dim", shape.head_dim) != shape.head_dim:
        raise UserError(
            f"{path}: head_dim {params['head_dim']} times {num_heads} heads is not dim {embed_dim}: not supported"
        )
    return shape


def _num_rows_of_meta_embedding(directory: Path) -> int:
    """Read the size of the vocabulary off the weights; Llama 2's where they are not there or damaged.

    Shards split the embedding's columns: each has all rows. What is wrong with a file is said when it is loaded.
    """
    for file in sorted(directory.glob("consolidated.*.pth"))[:1]:
        try:
            embedding = torch.load(file, map_location="meta", weights_only=True, mmap=True)["tok_embeddings.weight"]
            return len(embedding)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError):
            break
    return LLAMA2_7B.vocab_size
