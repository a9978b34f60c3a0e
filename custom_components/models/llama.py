"""Functions that put a Llama together from its parts, as torchtune's TransformerDecoder with its parameter names."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from torchtune.modules import TiedLinear, TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.modules.common_utils import reparametrize_as_dtype_state_dict_post_hook
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from custom_components.models import nf4
from custom_components.models.attention import SelfAttention
from custom_components.models.dora import DoRALinear
from custom_components.models.feed_forward import FeedForward
from custom_components.models.lora import FrozenLinear, LoRALinear
from custom_components.models.rms_norm import RMSNorm
from custom_components.models.rotary import RotaryPositions
from custom_components.models.shapes import LlamaShape

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "output_proj")
HUGGING_FACE_SPELLINGS = {"o_proj": "output_proj"}


@dataclass(frozen=True)
class LinearPlace:
    """The place and the size of one linear layer of a Llama.

    Attributes:
        name: torchtune's name of the module, layers.0.attn.q_proj for example.
        role: "output" is the head.
        tied_to: the embedding whose weight the head shares; None: the layer has a weight of its own.
    """

    name: str
    role: Literal["attention", "feed_forward", "output"]
    in_dim: int
    out_dim: int
    tied_to: nn.Embedding | None = None


# Makes the layer for a place: a module from (..., in_dim) to (..., out_dim), or for a tied head torchtune's TiedLinear.
LinearMaker = Callable[[LinearPlace], nn.Module]


def llama(shape: LlamaShape, linear: LinearMaker) -> TransformerDecoder:
    """Build a Llama-architecture model.

    Args:
        shape: the model's sizes.
        linear: makes every linear layer, and so decides which are frozen, quantized, adapted or trained.
    """
    # note: rope's cache is a buffer outside the checkpoint, so it must have values even when the weights do not yet.
    with torch.device("cpu") if torch.empty(0).is_meta else torch.device(torch.empty(0).device):
        rope = RotaryPositions(shape.head_dim, shape.max_seq_len, shape.rope_base)
    norm = partial(RMSNorm, shape.embed_dim, shape.norm_eps)
    layers = [
        TransformerSelfAttentionLayer(
            attn=_self_attention(shape, f"layers.{index}.attn", linear, rope),
            mlp=_feed_forward(shape, f"layers.{index}.mlp", linear),
            sa_norm=norm(),
            mlp_norm=norm(),
        )
        for index in range(shape.num_layers)
    ]
    tok_embeddings = nn.Embedding(shape.vocab_size, shape.embed_dim)
    tied_to = tok_embeddings if shape.tied_embeddings else None
    return TransformerDecoder(
        tok_embeddings=tok_embeddings,
        layers=layers,
        max_seq_len=shape.max_seq_len,
        num_heads=shape.num_heads,
        head_dim=shape.head_dim,
        norm=norm(),
        output=linear(LinearPlace("output", "output", shape.embed_dim, shape.vocab_size, tied_to)),
    )


def _self_attention(shape: LlamaShape, name: str, linear: LinearMaker, rope: RotaryPositions) -> SelfAttention:
    kv_dim = shape.num_kv_heads * shape.head_dim
    out_dims = {"q_proj": shape.embed_dim, "k_proj": kv_dim, "v_proj": kv_dim, "output_proj": shape.embed_dim}
    projections = {
        projection: linear(LinearPlace(f"{name}.{projection}", "attention", shape.embed_dim, out_dim))
        for projection, out_dim in out_dims.items()
    }
    return SelfAttention(shape, pos_embeddings=rope, **projections)


def _feed_forward(shape: LlamaShape, name: str, linear: LinearMaker) -> FeedForward:
    narrow, wide = shape.embed_dim, shape.intermediate_dim
    return FeedForward(
        gate_proj=linear(LinearPlace(f"{name}.w1", "feed_forward", narrow, wide)),
        down_proj=linear(LinearPlace(f"{name}.w2", "feed_forward", wide, narrow)),
        up_proj=linear(LinearPlace(f"{name}.w3", "feed_forward", narrow, wide)),
    )


def trained_linear(place: LinearPlace) -> nn.Module:
    """Make a layer whose weight is trained, for any place."""
    if place.tied_to is not None:
        return TiedLinear(place.tied_to)
    return nn.Linear(place.in_dim, place.out_dim, bias=False)


def frozen_linear(place: LinearPlace, *, quantize_base: bool) -> nn.Module:
    """Make a frozen layer for any place; with `quantize_base` in NF4, except for the head and odd shapes."""
    if place.tied_to is not None:
        return TiedLinear(place.tied_to)
    return FrozenLinear(place.in_dim, place.out_dim, quantize_base=quantize_base and _can_quantize(place))


def _can_quantize(place: LinearPlace) -> bool:
    return place.role != "output" and nf4.can_quantize((place.out_dim, place.in_dim))


def lora_llama(
    shape: LlamaShape,
    lora_attn_modules: Sequence[str],
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
    *,
    adapter_dtype: str | None = None,
    use_rslora: bool = False,
) -> TransformerDecoder:
    """Build a Llama-architecture model with frozen weights and LoRA adapters.

    Args:
        shape: the model's sizes.
        lora_attn_modules: attention projections with an adapter, of q_proj, k_proj, v_proj, output_proj (or o_proj).
        apply_lora_to_mlp: adapters on gate, up and down of every feed-forward.
        apply_lora_to_output: an adapter on the output head.
        lora_rank, lora_alpha, lora_dropout: see :class:`LoRALinear`.
        use_dora: adapters are :class:`DoRALinear`.
        quantize_base: NF4 for the linear weights of attention and feed-forward that divide into blocks; embeddings and
            output head stay as they are.
        adapter_dtype, use_rslora: see :class:`LoRALinear`.

    Raises:
        ValueError: for an attention module that does not exist.
    """
    adapted_modules = {HUGGING_FACE_SPELLINGS.get(name, name) for name in lora_attn_modules}
    if unknown := adapted_modules - set(ATTENTION_MODULES):
        raise ValueError(f"lora_attn_modules: {sorted(unknown)} are none of {list(ATTENTION_MODULES)}")
    variant = DoRALinear if use_dora else LoRALinear

    def linear(place: LinearPlace) -> nn.Module:
        is_adapted = {
            "attention": place.name.rpartition(".")[2] in adapted_modules,
            "feed_forward": apply_lora_to_mlp,
            "output": apply_lora_to_output,
        }[place.role]
        if not is_adapted:
            return frozen_linear(place, quantize_base=quantize_base)
        return variant(
            place.in_dim,
            place.out_dim,
            lora_rank,
            lora_alpha,
            lora_dropout,
            quantize_base=quantize_base and _can_quantize(place),
            weight=None if place.tied_to is None else place.tied_to.weight,
            adapter_dtype=adapter_dtype,
            use_rslora=use_rslora,
        )

    model = llama(shape, linear)
    set_trainable_params(model, get_adapter_params(model))
    if quantize_base:
        # For torchtune's own recipes, which save the state dict: it has NF4 weights in the compute dtype.
        model._register_state_dict_hook(
            partial(reparametrize_as_dtype_state_dict_post_hook, dtype=model.tok_embeddings.weight.dtype)
        )
    return model
