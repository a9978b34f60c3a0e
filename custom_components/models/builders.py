"""Llama models with LoRA adapters, as torchtune builders: plain functions that return its TransformerDecoder."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torchtune.modules import TiedLinear, TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.modules.common_utils import reparametrize_as_dtype_state_dict_post_hook
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from custom_components.models import nf4
from custom_components.models import shapes as llama_shapes
from custom_components.models.attention import SelfAttention
from custom_components.models.feed_forward import FeedForward
from custom_components.models.lora import FrozenLinear, LoRALinear
from custom_components.models.rms_norm import RMSNorm
from custom_components.models.rotary import RotaryPositions
from custom_components.models.shapes import LlamaShape

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "output_proj")
HUGGING_FACE_SPELLINGS = {"o_proj": "output_proj"}


def lora_llama(
    shape: LlamaShape,
    lora_attn_modules: Sequence[str],
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    quantize_base: bool = False,
    adapter_dtype: str = "fp32",
    use_rslora: bool = False,
    use_dora: bool = False,
) -> TransformerDecoder:
    """A Llama-architecture model with frozen weights and LoRA adapters, in torchtune's parameter names.

    Args:
        shape: the model's sizes.
        lora_attn_modules: attention projections with an adapter, of q_proj, k_proj, v_proj, output_proj (or o_proj).
        apply_lora_to_mlp: adapters on gate, up and down of every feed-forward.
        apply_lora_to_output: an adapter on the output head.
        lora_rank, lora_alpha, lora_dropout: see :class:`LoRALinear`.
        quantize_base: NF4 for the linear weights of attention and feed-forward that divide into blocks; embeddings and
            output head stay as they are.
        adapter_dtype: "fp32", or "bf16" for recipes that refuse parameters of two dtypes.
        use_rslora, use_dora: see :class:`LoRALinear`.

    Raises:
        ValueError: for an attention module that does not exist.
    """
    adapted_modules = {HUGGING_FACE_SPELLINGS.get(name, name) for name in lora_attn_modules}
    if unknown := adapted_modules - set(ATTENTION_MODULES):
        raise ValueError(f"lora_attn_modules: {sorted(unknown)} are none of {list(ATTENTION_MODULES)}")

    def linear(in_dim: int, out_dim: int, *, adapted: bool, quantized: bool = quantize_base) -> nn.Module:
        quantized = quantized and nf4.can_quantize((out_dim, in_dim))
        if not adapted:
            return FrozenLinear(in_dim, out_dim, quantize_base=quantized)
        return LoRALinear(
            in_dim,
            out_dim,
            lora_rank,
            lora_alpha,
            lora_dropout,
            quantize_base=quantized,
            adapter_dtype=adapter_dtype,
            use_rslora=use_rslora,
            use_dora=use_dora,
        )

    # note: rope's cache is a buffer outside the checkpoint, so it must have values even when the weights do not yet.
    with torch.device("cpu") if torch.empty(0).is_meta else torch.device(torch.empty(0).device):
        rope = RotaryPositions(shape.head_dim, shape.max_seq_len, shape.rope_base)

    def attention() -> SelfAttention:
        kv_dim = shape.num_kv_heads * shape.head_dim
        return SelfAttention(
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            q_proj=linear(shape.embed_dim, shape.embed_dim, adapted="q_proj" in adapted_modules),
            k_proj=linear(shape.embed_dim, kv_dim, adapted="k_proj" in adapted_modules),
            v_proj=linear(shape.embed_dim, kv_dim, adapted="v_proj" in adapted_modules),
            output_proj=linear(shape.embed_dim, shape.embed_dim, adapted="output_proj" in adapted_modules),
            pos_embeddings=rope,
        )

    def feed_forward() -> FeedForward:
        return FeedForward(
            gate_proj=linear(shape.embed_dim, shape.intermediate_dim, adapted=apply_lora_to_mlp),
            down_proj=linear(shape.intermediate_dim, shape.embed_dim, adapted=apply_lora_to_mlp),
            up_proj=linear(shape.embed_dim, shape.intermediate_dim, adapted=apply_lora_to_mlp),
        )

    norm = partial(RMSNorm, shape.embed_dim, shape.norm_eps)
    layers = [
        TransformerSelfAttentionLayer(attn=attention(), mlp=feed_forward(), sa_norm=norm(), mlp_norm=norm())
        for _ in range(shape.num_layers)
    ]
    tok_embeddings = nn.Embedding(shape.vocab_size, shape.embed_dim)
    output: nn.Module | TiedLinear
    if shape.tied_embeddings and not apply_lora_to_output:
        output = TiedLinear(tok_embeddings)
    else:
        output = linear(shape.embed_dim, shape.vocab_size, adapted=apply_lora_to_output, quantized=False)
        if shape.tied_embeddings:
            output.weight = tok_embeddings.weight
            if isinstance(output, LoRALinear) and use_dora:
                output.initialize_dora_magnitude()
    model = TransformerDecoder(
        tok_embeddings=tok_embeddings,
        layers=layers,
        max_seq_len=shape.max_seq_len,
        num_heads=shape.num_heads,
        head_dim=shape.head_dim,
        norm=norm(),
        output=output,
    )
    set_trainable_params(model, get_adapter_params(model))
    if quantize_base:
        # For torchtune's own recipes, which save the state dict: NF4 tensors leave it in the compute dtype.
        model._register_state_dict_hook(
            partial(reparametrize_as_dtype_state_dict_post_hook, dtype=tok_embeddings.weight.dtype)
        )
    return model


lora_llama2_7b = partial(lora_llama, llama_shapes.LLAMA2_7B)
lora_llama2_13b = partial(lora_llama, llama_shapes.LLAMA2_13B)
lora_llama2_70b = partial(lora_llama, llama_shapes.LLAMA2_70B)
lora_open_llama_3b = partial(lora_llama, llama_shapes.OPEN_LLAMA_3B)
lora_tinyllama_1b = partial(lora_llama, llama_shapes.TINYLLAMA_1B)


def lora_llama_from_config(
    checkpoint_dir: str | Path,
    lora_attn_modules: Sequence[str],
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    quantize_base: bool = False,
    adapter_dtype: str = "fp32",
    use_rslora: bool = False,
    use_dora: bool = False,
) -> TransformerDecoder:
    """`lora_llama` with the shape that the checkpoint's own config.json or params.json states.

    Raises:
        UserError: the directory or its config is not there, or it is no plain Llama.
    """
    return lora_llama(
        llama_shapes.shape_from_checkpoint(Path(checkpoint_dir)),
        lora_attn_modules,
        apply_lora_to_mlp,
        apply_lora_to_output,
        lora_rank,
        lora_alpha,
        lora_dropout,
        quantize_base,
        adapter_dtype,
        use_rslora,
        use_dora,
    )
