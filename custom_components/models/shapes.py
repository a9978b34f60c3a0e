"""The sizes of Llama-architecture models, by name and from a checkpoint's own config."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from custom_components.models.checkpoint_configs import HuggingFaceKeys, MetaKeys, RopeKeys, checked_keys
from custom_components.runtime.errors import UserError
from custom_components.runtime.json_files import read_json_object
from custom_components.runtime.torch_files import load_torch_file


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are scaled for longer texts than the pretraining's, see :func:`frequency_divisors_P`.

    Attributes:
        factor: low frequencies, or with "linear" all, are divided by it.
        low_freq_factor, high_freq_factor: turns in the original context below which a frequency is low, above which
            high.
        original_max_seq_len: the context of the pretraining, in tokens.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


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
        rope_scaling: None: rotary frequencies are those of `rope_base`.
        own_head_dim: the width of a head where it is not `embed_dim / num_heads`.
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
    rope_scaling: RopeScaling | None = None
    own_head_dim: int | None = None

    @property
    def head_dim(self) -> int:
        return self.own_head_dim or self.embed_dim // self.num_heads


# Llama 2: Touvron et al. 2023, arXiv 2307.09288, table 1 and appendix A.2.1; intermediate sizes and epsilon from the
# config.json of meta-llama/Llama-2-{7b,13b,70b}-hf. The others from the config.json of their repositories.
LLAMA2_7B = LlamaShape(32_000, 32, 32, 32, 4096, 11_008, 4096)
LLAMA2_13B = LlamaShape(32_000, 40, 40, 40, 5120, 13_824, 4096)
LLAMA2_70B = LlamaShape(32_000, 80, 64, 8, 8192, 28_672, 4096)
CODE_LLAMA2_7B = LlamaShape(32_016, 32, 32, 32, 4096, 11_008, 16_384, rope_base=1_000_000.0)
OPEN_LLAMA_3B = LlamaShape(32_000, 26, 32, 32, 3200, 8640, 2048, norm_eps=1e-6)
TINYLLAMA_1B = LlamaShape(32_000, 22, 32, 4, 2048, 5632, 2048)
# v0.1, of which attention sees 4096 tokens; later versions have another rotary base, and v0.3 more pieces.
MISTRAL_7B = LlamaShape(32_000, 32, 32, 8, 4096, 14_336, 4096)
LLAMA3_8B = LlamaShape(128_256, 32, 32, 8, 4096, 14_336, 8192, rope_base=500_000.0)
LLAMA3_1_8B = replace(LLAMA3_8B, max_seq_len=131_072, rope_scaling=RopeScaling("llama3", 8.0))
_LLAMA3_2_ROPE = RopeScaling("llama3", 32.0)
LLAMA3_2_1B = LlamaShape(128_256, 16, 32, 8, 2048, 8192, 131_072, 500_000.0, 1e-5, True, _LLAMA3_2_ROPE)
LLAMA3_2_3B = LlamaShape(128_256, 28, 24, 8, 3072, 8192, 131_072, 500_000.0, 1e-5, True, _LLAMA3_2_ROPE)


def shape_from_checkpoint(checkpoint_dir: Path) -> LlamaShape:
    """Read the shape that a checkpoint directory states, see :func:`shape_and_config`."""
    return shape_and_config(checkpoint_dir)[0]


def shape_and_config(
    checkpoint_dir: Path, check_config: Callable[[dict[str, Any]], None] | None = None
) -> tuple[LlamaShape, dict[str, Any]]:
    """Read the shape that a checkpoint states, and all of its config.json; Meta's params.json gives the shape only.

    Args:
        check_config: called with config.json before its shape is read.

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
        if check_config is not None:
            check_config(config)
        return _shape_from_hugging_face(config, path), config
    if (path := checkpoint_dir / "params.json").is_file():
        return _shape_from_meta(read_json_object(path), path), {}
    raise UserError(
        f"checkpoint_dir: {str(checkpoint_dir)!r} has neither config.json nor params.json; is the download whole?"
    )


def _shape_from_hugging_face(config: dict[str, Any], path: Path) -> LlamaShape:
    model_type = config.get("model_type") or "llama"
    if model_type not in ("llama", "mistral"):
        raise UserError(f"{path}: model_type = {model_type!r} is not supported: {_what_is_missing(model_type)}")
    keys = checked_keys(HuggingFaceKeys, config, path)
    rope = keys.rope
    refusals = {
        "hidden_act": keys.hidden_act != "silu" and keys.hidden_act,
        "attention_bias": keys.attention_bias,
        "mlp_bias": keys.mlp_bias,
        "partial_rotary_factor": (rope.partial_rotary_factor or keys.partial_rotary_factor or 1.0) != 1.0,
    }
    _refuse(refusals, path)
    num_heads, embed_dim, max_seq_len = keys.num_attention_heads, keys.hidden_size, keys.max_position_embeddings
    head_dim = keys.head_dim or embed_dim // num_heads
    return LlamaShape(
        vocab_size=keys.vocab_size,
        num_layers=keys.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=keys.num_key_value_heads or num_heads,
        embed_dim=embed_dim,
        intermediate_dim=keys.intermediate_size,
        # Within the window attention is that of a Llama.
        max_seq_len=min(max_seq_len, keys.sliding_window or max_seq_len),
        rope_base=rope.rope_theta or keys.rope_theta or 10_000.0,
        norm_eps=keys.rms_norm_eps,
        tied_embeddings=bool(keys.tie_word_embeddings),
        rope_scaling=_rope_scaling(rope, max_seq_len, path),
        own_head_dim=head_dim if head_dim * num_heads != embed_dim else None,
    )


# What a model of each kind has that no Llama has, for those that people try: transformers, models/*/modeling_*.py.
_MISSING = {
    model_type: what
    for what, model_types in {
        "its attention has biases": "qwen2 seed_oss",
        "it normalizes queries and keys": "qwen3 olmo2 olmo3 gemma3 gemma3_text exaone4 apertus",
        "its feed-forward is of experts": (
            "mixtral qwen2_moe qwen3_moe deepseek_v2 deepseek_v3 llama4 llama4_text gpt_oss phimoe jamba"
        ),
        "its feed-forward has no gate": "starcoder2 nemotron arcee",
        "its embeddings and norms are scaled in another way": "gemma gemma2 granite",
        "its projections are joined in one weight": "phi3 phi4 internlm2 baichuan chatglm qwen",
        "some of its layers have no rotary positions": "smollm3 cohere2",
        "some of its layers see a window only": "ministral",
        "its layers are put together otherwise": (
            "phi gpt2 gptj gpt_neox falcon bloom mpt opt cohere olmo stablelm glm4"
        ),
        "it reads images": "mllama llava llava_next mistral3 pixtral idefics3 qwen2_vl qwen2_5_vl qwen3_vl",
        "it is not a decoder of text alone": "bert roberta t5 whisper voxtral",
        "it has layers other than attention": "mamba mamba2 falcon_mamba falcon_h1 rwkv lfm2 qwen3_next",
        "its weights are of three values": "bitnet",
    }.items()
    for model_type in model_types.split()
}


def _what_is_missing(model_type: Any) -> str:
    missing = f"{_MISSING[model_type]}, and that is not built here; " if str(model_type) in _MISSING else ""
    return f"{missing}this package trains the Llama and Mistral architectures, model_type llama or mistral"


def _rope_scaling(rope: RopeKeys, max_seq_len: int, path: Path) -> RopeScaling | None:
    # At a factor of 1 these leave every frequency as it is; transformers, modeling_rope_utils.py.
    if rope.kind == "default" or (rope.kind in ("linear", "dynamic", "llama3") and rope.factor == 1):
        return None
    if rope.kind not in ("linear", "llama3"):
        raise UserError(f"{path}: rope scaling = {rope.kind!r} is not supported; default, linear and llama3 are")
    needed = ("factor",) if rope.kind == "linear" else ("factor", "low_freq_factor", "high_freq_factor")
    if missing := [name for name in needed if getattr(rope, name) is None]:
        raise UserError(f"{path}: rope scaling {rope.kind!r} is without {', '.join(missing)}; download the file again")
    assert rope.factor is not None
    if rope.kind == "linear":
        return RopeScaling("linear", rope.factor)
    assert rope.low_freq_factor is not None and rope.high_freq_factor is not None
    return RopeScaling(
        "llama3",
        rope.factor,
        rope.low_freq_factor,
        rope.high_freq_factor,
        rope.original_max_position_embeddings or max_seq_len,
    )


def _refuse(refusals: dict[str, Any], path: Path) -> None:
    for name, value in refusals.items():
        if value:
            raise UserError(
                f"{path}: {name} = {value!r} is not supported; this package trains plain Llama architectures"
            )


def _shape_from_meta(params: dict[str, Any], path: Path) -> LlamaShape:
    """Read Meta's params.json; for the feed-forward's width see meta-llama/llama @689c7f2, model.py, FeedForward."""
    # Llama 3.2's quantized models and those with images; Mistral's names for windows and experts; Llama 4's.
    refused = (
        *("quantization_args", "lora_args", "sliding_window", "moe", "vision_chunk_size"),
        *("moe_args", "vision_args", "use_qk_norm", "nope_layer_interval"),
    )
    _refuse({key: params.get(key) for key in refused}, path)
    keys = checked_keys(MetaKeys, params, path)
    intermediate_dim = int((keys.ffn_dim_multiplier or 1.0) * int(2 * (4 * keys.dim) / 3))
    rounded_dim = keys.multiple_of * ((intermediate_dim + keys.multiple_of - 1) // keys.multiple_of)
    return LlamaShape(
        # Llama 2's params.json has -1 and CodeLlama's has none, because the tokenizer states the size.
        vocab_size=keys.vocab_size if keys.vocab_size > 0 else _num_rows_of_meta_embedding(path.parent),
        num_layers=keys.n_layers,
        num_heads=keys.n_heads,
        num_kv_heads=keys.n_kv_heads or keys.n_heads,
        embed_dim=keys.dim,
        intermediate_dim=keys.hidden_dim or rounded_dim,
        max_seq_len=_context_of_meta(keys),
        rope_base=keys.rope_theta,
        norm_eps=keys.norm_eps,
        rope_scaling=_rope_scaling_of_meta(keys),
        own_head_dim=keys.head_dim if keys.head_dim not in (None, keys.dim / keys.n_heads) else None,
    )


def _context_of_meta(keys: MetaKeys) -> int:
    """The context is in no file of Meta's: that of the release whose params.json looks so."""
    if keys.use_scaled_rope:
        return LLAMA3_1_8B.max_seq_len
    return (LLAMA3_8B if keys.vocab_size == LLAMA3_8B.vocab_size else LLAMA2_7B).max_seq_len


def _rope_scaling_of_meta(keys: MetaKeys) -> RopeScaling | None:
    """Read Llama 3.1's scaled frequencies; the factor of 3.2's small models is in none of Meta's files."""
    if not keys.use_scaled_rope:
        return None
    for small in (LLAMA3_2_1B, LLAMA3_2_3B):
        if (keys.dim, keys.n_layers) == (small.embed_dim, small.num_layers):
            return small.rope_scaling
    return RopeScaling("llama3", keys.rope_scaling_factor or 8.0)


def _num_rows_of_meta_embedding(directory: Path) -> int:
    """Read the size of the vocabulary off the weights; Llama 2's where they are not there or damaged.

    Shards split the embedding's columns: each has all rows. What is wrong with a file is said when it is loaded.
    """
    for file in sorted(directory.glob("consolidated.*.pth"))[:1]:
        try:
            return len(load_torch_file(file, map_location="meta", mmap=True)["tok_embeddings.weight"])
        except (ValueError, KeyError, TypeError, IndexError):
            break
    return LLAMA2_7B.vocab_size
