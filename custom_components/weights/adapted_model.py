"""The model that fits an adapter on disk, and loading both for inference."""

from pathlib import Path
from typing import Any

import torch
from torchtune.modules import TransformerDecoder

from custom_components.models.builders import lora_llama_from_config
from custom_components.models.llama import ATTENTION_MODULES
from custom_components.models.lora import FrozenLinear, adapter_modules
from custom_components.weights.adapter_files import stored_adapter
from custom_components.weights.adapters import check_adapter_fits, check_same_base, copy_into_adapter, target_names
from custom_components.weights.checkpoint_loading import check_checkpoint, load_base_weights
from custom_components.weights.peft_format import BASE_WEIGHTS, TARGETS


def lora_settings(adapter_dir: Path) -> dict[str, Any]:
    """The builder's arguments that an adapter was made with, of its adapter_config.json and the names of its tensors.

    An adapter on some of the layers only, or on some of a feed-forward's three, is built by :func:`model_for_adapter`.

    Raises:
        UserError: no adapter there, or one of a kind that is not built here.
    """
    stored = stored_adapter(adapter_dir)
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


def model_for_adapter(checkpoint_dir: Path, adapter_dir: Path | None, quantize_base: bool) -> TransformerDecoder:
    """A checkpoint's model on the meta device, with adapters where the directory's adapter has them, if one is named.

    Raises:
        UserError: no Llama's config, no adapter there, or one of a kind that is not built here, or that brings
            embeddings or an output head other than the checkpoint's.
    """
    lora = {"lora_attn_modules": []} if adapter_dir is None else lora_settings(adapter_dir)
    with torch.device("meta"):
        model = lora_llama_from_config(checkpoint_dir, quantize_base=quantize_base, **lora)
        if adapter_dir is None:
            return model
        stored = stored_adapter(adapter_dir)
        for name, layer in adapter_modules(model).items():
            if name not in stored.modules:
                parent, _, child = name.rpartition(".")
                frozen = FrozenLinear(layer.in_dim, layer.out_dim, quantize_base=layer.quantize_base)
                setattr(model.get_submodule(parent), child, frozen)
    if brought := [name for name in BASE_WEIGHTS if name in stored.tensors]:
        sources = check_checkpoint(model, checkpoint_dir)
        for name in brought:
            source = sources.get(name, sources["tok_embeddings.weight"])  # tied: one weight
            check_same_base(name, stored.tensors[name].read(), source.read())
    return model


def load_model_for_inference(
    checkpoint_dir: Path, adapter_dir: Path | None, quantize_base: bool, dtype: torch.dtype, device: torch.device
) -> TransformerDecoder:
    """A checkpoint's model, with an adapter where one is named, ready to answer.

    Raises:
        UserError: a checkpoint or adapter that is not there, not whole, or not of each other.
    """
    model = model_for_adapter(checkpoint_dir, adapter_dir, quantize_base)
    adapter = check_adapter_fits(model, adapter_dir) if adapter_dir else {}
    load_base_weights(model, checkpoint_dir, dtype, device)
    copy_into_adapter(model, adapter)
    return model.eval()
