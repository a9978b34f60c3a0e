"""The model that fits an adapter on disk, and loading both for inference."""

from typing import Any

import torch
from torchtune.modules import TransformerDecoder

from custom_components.models.llama import ATTENTION_MODULES, lora_llama
from custom_components.models.lora import FrozenLinear, adapter_modules
from custom_components.weights.adapter_files import StoredAdapter
from custom_components.weights.adapters import check_adapter_fits, check_same_base, copy_into_adapter, target_names
from custom_components.weights.checkpoint_files import BaseCheckpoint
from custom_components.weights.checkpoint_loading import check_base_weights, load_base_weights
from custom_components.weights.peft_format import BASE_WEIGHTS, TARGETS


def lora_settings(stored: StoredAdapter) -> dict[str, Any]:
    """Give the builder's arguments for an adapter, from its adapter_config.json and the names of its tensors.

    An adapter on some of the layers only, or on some of a feed-forward's three, is built by :func:`model_for_adapter`.
    """
    targets = {TARGETS[target] for target in target_names(stored.modules)}
    return {
        "lora_attn_modules": [name for name in ATTENTION_MODULES if name in targets],
        "apply_lora_to_mlp": bool(targets & {"w1", "w2", "w3"}),
        "apply_lora_to_output": "output" in targets,
        "lora_rank": stored.config.rank,
        "lora_alpha": stored.config.alpha,
        "use_rslora": stored.config.use_rslora,
        "use_dora": stored.use_dora,
    }


def model_for_adapter(base: BaseCheckpoint, stored: StoredAdapter | None, quantize_base: bool) -> TransformerDecoder:
    """Build a checkpoint's model on the meta device, with adapters where the one on disk has them.

    Raises:
        UserError: the adapter brings embeddings or an output head other than the checkpoint's.
    """
    lora = {"lora_attn_modules": []} if stored is None else lora_settings(stored)
    with torch.device("meta"):
        model = lora_llama(base.shape, quantize_base=quantize_base, **lora)
        if stored is None:
            return model
        for name, layer in adapter_modules(model).items():
            if name not in stored.modules:
                parent, _, child = name.rpartition(".")
                frozen = FrozenLinear(layer.in_dim, layer.out_dim, quantize_base=layer.quantize_base)
                setattr(model.get_submodule(parent), child, frozen)
    if brought := [name for name in BASE_WEIGHTS if name in stored.tensors]:
        sources = check_base_weights(model, base)
        for name in brought:
            source = sources.get(name, sources["tok_embeddings.weight"])  # tied: one weight
            check_same_base(name, stored.tensors[name].read(), source.read())
    return model


def load_model_for_inference(
    base: BaseCheckpoint,
    stored: StoredAdapter | None,
    quantize_base: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> TransformerDecoder:
    """Load a checkpoint's model, with an adapter where one is given, ready to answer.

    Raises:
        UserError: a checkpoint or adapter that is incomplete, or that does not fit the other.
    """
    model = model_for_adapter(base, stored, quantize_base)
    adapter = check_adapter_fits(model, stored) if stored else {}
    load_base_weights(model, base, dtype, device)
    copy_into_adapter(model, adapter)
    return model.eval()
