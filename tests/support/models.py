"""Models with adapters, and tokens for them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from custom_components.models import nf4
from custom_components.models.builders import llama_from_config, lora_llama_from_config
from custom_components.models.dora import DoRALinear
from custom_components.models.linear_names import hugging_face_module
from custom_components.models.lora import LoRALinear, adapter_modules
from custom_components.weights.adapted_model import load_model_for_inference
from custom_components.weights.adapter_files import open_adapter
from custom_components.weights.checkpoint_files import open_checkpoint
from custom_components.weights.checkpoint_loading import load_base_weights
from custom_components.weights.names import halve_rope_rows

CPU = torch.device("cpu")
ALL_ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]
TOKENS = torch.randint(512, (2, 30), generator=torch.Generator().manual_seed(0))


def loaded_model(
    checkpoint_dir: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **lora: Any
) -> TransformerDecoder:
    """A checkpoint's model with adapters on all linear layers, unless told otherwise."""
    settings: dict[str, Any] = {"lora_attn_modules": ALL_ATTENTION, "apply_lora_to_mlp": True, "lora_rank": 4} | lora
    with torch.device("meta"):
        model = lora_llama_from_config(checkpoint_dir, **settings)
    torch.manual_seed(seed)
    load_base_weights(model, open_checkpoint(checkpoint_dir), dtype, CPU)
    return model


def whole_model(
    checkpoint_dir: Path,
    train_only: list[str] | None = None,
    dtype: torch.dtype = torch.float32,
    trained_dtype: torch.dtype | None = None,
) -> TransformerDecoder:
    """A checkpoint's model whose own weights are trained, all or those that `train_only` names."""
    with torch.device("meta"):
        model = llama_from_config(checkpoint_dir, train_only)
    load_base_weights(model, open_checkpoint(checkpoint_dir), dtype, CPU, trained_dtype=trained_dtype)
    return model.train()


def inference_model(
    checkpoint_dir: Path, adapter_dir: Path | None = None, quantize_base: bool = False
) -> TransformerDecoder:
    """A checkpoint's model in fp32, with an adapter where one is named, as recipes load it to answer."""
    adapter = open_adapter(adapter_dir) if adapter_dir else None
    return load_model_for_inference(open_checkpoint(checkpoint_dir), adapter, quantize_base, torch.float32, CPU)


def with_random_adapters(model: TransformerDecoder, seed: int = 1) -> TransformerDecoder:
    """Gives every B a value, so that the adapters change the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def with_random_variants(model: TransformerDecoder) -> TransformerDecoder:
    """Gives B and, where there is one, the magnitude other values than they begin with."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in with_random_adapters(model).named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
    return model


def merged_lora_weight(layer: LoRALinear) -> Tensor:
    """W + s B A."""
    return layer.weight + layer.scaling * layer.lora_b.weight @ layer.lora_a.weight


def merged_dora_weight(layer: DoRALinear) -> Tensor:
    """magnitude * (W + s B A) / ||W + s B A||, equation 5 of the paper, with the sum built."""
    direction = layer.weight + layer.scaling * layer.lora_b.weight @ layer.lora_a.weight
    return layer.magnitude.unsqueeze(1) * direction / direction.norm(dim=1, keepdim=True)


def dequantized_in_hugging_face_order(model: TransformerDecoder, parameter_name: str) -> Tensor:
    """What a quantized weight of `model` stands for, as transformers' model of the checkpoint holds it."""
    module_name = parameter_name.removesuffix(".weight")
    [tune_name] = [f"{name}.weight" for name in adapter_modules(model) if hugging_face_module(name) == module_name]
    weight = nf4.dequantize(model.get_parameter(tune_name), torch.float32)
    if "q_proj" in tune_name:
        return halve_rope_rows(weight, model.num_heads)
    if "k_proj" in tune_name:
        return halve_rope_rows(weight, model.layers[0].attn.num_kv_heads)
    return weight
