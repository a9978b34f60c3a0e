"""A checkpoint with bitsandbytes' NF4 base and an adapter, through transformers and PEFT.

Runs in the environment of requirements-trl.txt, where this package is not installed.
"""

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def quantized_peft_model(checkpoint_dir: str, adapter_dir: str, *, is_trainable: bool) -> PeftModel:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(checkpoint_dir, quantization_config=quantization, dtype=torch.bfloat16)
    return PeftModel.from_pretrained(base, adapter_dir, is_trainable=is_trainable)
