"""Llama models with LoRA adapters: the builders that a config may name as `model`."""

from custom_components.models.builders import (
    lora_llama2_7b,
    lora_llama2_13b,
    lora_llama2_70b,
    lora_llama_from_config,
    lora_open_llama_3b,
    lora_tinyllama_1b,
)
from custom_components.models.dora import DoRALinear
from custom_components.models.llama import lora_llama
from custom_components.models.lora import LoRALinear

__all__ = [
    "DoRALinear",
    "LoRALinear",
    "lora_llama",
    "lora_llama2_13b",
    "lora_llama2_70b",
    "lora_llama2_7b",
    "lora_llama_from_config",
    "lora_open_llama_3b",
    "lora_tinyllama_1b",
]
