"""Hugging Face's names of a Llama's linear layers, and patterns of them.

Pattern: huggingface/peft 0.21.2, src/peft/utils/other.py, `get_pattern_key`.
"""

from collections.abc import Collection, Iterable

from custom_components.runtime.patterns import matches_whole

# torchtune's name of a linear layer by Hugging Face's.
TARGETS = {
    **{"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "output_proj"},
    **{"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "lm_head": "output"},
}
_HUGGING_FACE_NAMES = {tune: hf for hf, tune in TARGETS.items()} | {"attn": "self_attn"}
# Hugging Face's names of a module's parts by torchtune's, beside linear layers also embeddings and norms.
HUGGING_FACE_PARTS = _HUGGING_FACE_NAMES | {
    **{"tok_embeddings": "embed_tokens", "sa_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "scale": "weight",
}


def hugging_face_module(module: str) -> str:
    """Give Hugging Face's name of a linear layer: model.layers.0.self_attn.q_proj for layers.0.attn.q_proj."""
    name = ".".join(_HUGGING_FACE_NAMES.get(part, part) for part in module.split("."))
    return name if module == "output" else f"model.{name}"


def matching_pattern(patterns: Iterable[str], names: Collection[str]) -> str | None:
    """Find the first regular expression that matches the end of one of a module's names, whole parts of it."""
    for pattern in patterns:
        if any(matches_whole(rf"(.*\.)?({pattern})", name) for name in names):
            return pattern
    return None
