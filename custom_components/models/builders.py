"""Llama models with LoRA adapters by name: the sizes of :mod:`shapes`, put together by :mod:`llama`."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from torchtune.modules import TransformerDecoder

from custom_components.models import shapes as llama_shapes
from custom_components.models.llama import full_llama, lora_llama

# Those that torchtune has too have its names.
llama2_7b = partial(full_llama, llama_shapes.LLAMA2_7B)
llama2_13b = partial(full_llama, llama_shapes.LLAMA2_13B)
llama2_70b = partial(full_llama, llama_shapes.LLAMA2_70B)
qlora_llama2_7b = partial(lora_llama, llama_shapes.LLAMA2_7B, quantize_base=True)
qlora_llama2_13b = partial(lora_llama, llama_shapes.LLAMA2_13B, quantize_base=True)
qlora_llama2_70b = partial(lora_llama, llama_shapes.LLAMA2_70B, quantize_base=True)
lora_llama2_7b = partial(lora_llama, llama_shapes.LLAMA2_7B)
lora_llama2_13b = partial(lora_llama, llama_shapes.LLAMA2_13B)
lora_llama2_70b = partial(lora_llama, llama_shapes.LLAMA2_70B)
lora_code_llama2_7b = partial(lora_llama, llama_shapes.CODE_LLAMA2_7B)
lora_open_llama_3b = partial(lora_llama, llama_shapes.OPEN_LLAMA_3B)
lora_tinyllama_1b = partial(lora_llama, llama_shapes.TINYLLAMA_1B)
lora_llama3_8b = partial(lora_llama, llama_shapes.LLAMA3_8B)
lora_llama3_1_8b = partial(lora_llama, llama_shapes.LLAMA3_1_8B)
lora_llama3_2_1b = partial(lora_llama, llama_shapes.LLAMA3_2_1B)
lora_llama3_2_3b = partial(lora_llama, llama_shapes.LLAMA3_2_3B)
lora_mistral_7b = partial(lora_llama, llama_shapes.MISTRAL_7B)


def llama_from_config(checkpoint_dir: str | Path, train_only: Sequence[str] | None = None) -> TransformerDecoder:
    """Build `full_llama` with the shape that the checkpoint's own config.json or params.json states.

    Raises:
        UserError: the directory or its config does not exist, or the model is not a plain Llama; see `full_llama`.
    """
    return full_llama(llama_shapes.shape_from_checkpoint(Path(checkpoint_dir)), train_only)


def lora_llama_from_config(
    checkpoint_dir: str | Path,
    lora_attn_modules: Sequence[str],
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
    *,
    quantization: str | None = None,
    adapter_dtype: str | None = None,
    use_rslora: bool = False,
    init_lora_weights: str | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
) -> TransformerDecoder:
    """Build `lora_llama` with the shape that the checkpoint's own config.json or params.json states.

    Raises:
        UserError: the directory or its config does not exist, or the model is not a plain Llama; see `lora_llama`.
    """
    return lora_llama(
        llama_shapes.shape_from_checkpoint(Path(checkpoint_dir)),
        lora_attn_modules,
        apply_lora_to_mlp,
        apply_lora_to_output,
        lora_rank,
        lora_alpha,
        lora_dropout,
        use_dora,
        quantize_base,
        quantization=quantization,
        adapter_dtype=adapter_dtype,
        use_rslora=use_rslora,
        init_lora_weights=init_lora_weights,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        layers_to_transform=layers_to_transform,
    )
