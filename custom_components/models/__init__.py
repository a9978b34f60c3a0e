"""Llama models: the builders that a config may name as `model`, for torchtune's recipes under its own names."""

from custom_components.models.builders import (
    llama2_7b,
    llama2_13b,
    llama2_70b,
    llama_from_config,
    lora_code_llama2_7b,
    lora_llama2_7b,
    lora_llama2_13b,
    lora_llama2_70b,
    lora_llama3_1_8b,
    lora_llama3_2_1b,
    lora_llama3_2_3b,
    lora_llama3_8b,
    lora_llama_from_config,
    lora_mistral_7b,
    lora_open_llama_3b,
    lora_tinyllama_1b,
    qlora_llama2_7b,
    qlora_llama2_13b,
    qlora_llama2_70b,
)
from custom_components.models.dora import DoRALinear
from custom_components.models.llama import lora_llama
from custom_components.models.lora import LoRALinear
from custom_components.transforms import llama2_tokenizer

__all__ = [
    "DoRALinear",
    "LoRALinear",
    "llama2_13b",
    "llama2_70b",
    "llama2_7b",
    "llama2_tokenizer",
    "lora_code_llama2_7b",
    "llama_from_config",
    "lora_llama",
    "lora_llama2_13b",
    "lora_llama2_70b",
    "lora_llama2_7b",
    "lora_llama3_1_8b",
    "lora_llama3_2_1b",
    "lora_llama3_2_3b",
    "lora_llama3_8b",
    "lora_llama_from_config",
    "lora_mistral_7b",
    "lora_open_llama_3b",
    "lora_tinyllama_1b",
    "qlora_llama2_13b",
    "qlora_llama2_70b",
    "qlora_llama2_7b",
]
