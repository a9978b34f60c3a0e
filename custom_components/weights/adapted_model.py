"""The model that fits an adapter on disk, and loading both for inference."""

from typing import Any

import torch
from torchtune.modules import TransformerDecoder

from custom_components.models.linear_names import TARGETS, hugging_face_module
from custom_components.models.llama import ATTENTION_MODULES, lora_llama
from custom_components.models.lora import FrozenLinear, adapter_modules
from custom_components.models.token_rows import add_token_rows
from custom_components.weights.adapter_files import StoredAdapter
from custom_components.weights.adapter_settings import target_names
from custom_components.weights.adapters import check_adapter_fits, check_same_base, copy_into_adapter
from custom_components.weights.checkpoint_files import BaseCheckpoint
from custom_components.weights.checkpoint_loading import check_base_weights, load_base_weights
from custom_components.weights.stored_token_rows import stored_token_ids


def lora_settings(stored: StoredAdapter) -> dict[str, Any]:
    """Give the builder's arguments for an adapter, from its adapter_config.json and the names of its tensors.

    An adapter on some of the layers only, or on some of a feed-forward's three, is built by :func:`model_for_adapter`.
    """
    config = stored.config
    names = [hugging_face_module(name) for name in stored.modules]
    targets = {TARGETS[target] for target in target_names(stored.modules)}
    return {
        "lora_attn_modules": [name for name in ATTENTION_MODULES if name in targets],
        "apply_lora_to_mlp": bool(targets & {"w1", "w2", "w3"}),
        "apply_lora_to_output": "output" in targets,
        "lora_rank": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.use_rslora,
        "use_dora": stored.use_dora,
        "rank_pattern": {name: config.rank_of(name) for name in names if config.rank_of(name) != config.rank},
        "alpha_pattern": {name: config.alpha_of(name) for name in names if config.alpha_of(name) != config.alpha},
    }


def model_for_adapter(
    base: BaseCheckpoint, stored: StoredAdapter | None, quantize_base: bool = False, quantization: str | None = None
) -> TransformerDecoder:
    """Build a checkpoint's model on the meta device, with adapters where the one on disk has them.

    Raises:
        UserError: the adapter brings embeddings or an output head other than the checkpoint's.
    """
    lora = {"lora_attn_modules": []} if stored is None else lora_settings(stored)
    with torch.device("meta"):
        model = lora_llama(base.shape, quantize_base=quantize_base, quantization=quantization, **lora)
        if stored is None:
            return model
        is_tied = base.shape.tied_embeddings
        if token_ids := stored_token_ids(stored, base.shape.vocab_size, is_tied=is_tied):
            head_ids = token_ids.get("output", None if is_tied else [])
            add_token_rows(model, token_ids.get("tok_embeddings", []), head_ids)
        for name, layer in adapter_modules(model).items():
            if name not in stored.modules:
                parent, _, child = name.rpartition(".")
                frozen = FrozenLinear(layer.in_dim, layer.out_dim, quantization=layer.quantization)
                setattr(model.get_submodule(parent), child, frozen)
    if stored.base_weights:
        sources = check_base_weights(model, base)
        for name in stored.base_weights:
            source = sources["tok_embeddings.weight" if name == "output.weight" and name not in sources else name]
            check_same_base(name, stored.tensors[name].read(), source.read(), base.shape.vocab_size)
    return model


def load_model_for_inference(
    base: BaseCheckpoint,
    stored: StoredAdapter | None,
    quantize_base: bool,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str | None = None,
) -> TransformerDecoder:
    """Load a checkpoint's model, with an adapter where one is given, ready to answer.

    Args:
        quantize_base, quantization: see :func:`lora_llama`.

    Raises:
        UserError: a checkpoint or adapter that is incomplete, or that does not fit the other.
    """
    model = model_for_adapter(base, stored, quantize_base, quantization)
    adapter = check_adapter_fits(model, stored) if stored else {}
    load_base_weights(model, base, dtype, device)
    copy_into_adapter(model, adapter)
    return model.eval()
