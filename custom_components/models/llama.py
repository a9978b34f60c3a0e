"""Functions that put a Llama together from its parts, as torchtune's TransformerDecoder with its parameter names."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import nn
from torchtune.modules import TiedLinear, TransformerDecoder
from torchtune.modules.common_utils import reparametrize_as_dtype_state_dict_post_hook
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from custom_components.models.attention import SelfAttention
from custom_components.models.dora import DoRALinear
from custom_components.models.feed_forward import FeedForward
from custom_components.models.layer import LlamaLayer
from custom_components.models.linear_names import hugging_face_module, matching_pattern
from custom_components.models.lora import FrozenLinear, LoRALinear, adapter_modules
from custom_components.models.pissa import PiSSALinear
from custom_components.models.quantization import Quantization, can_quantize, chosen_quantization
from custom_components.models.rms_norm import RMSNorm
from custom_components.models.rotary import RotaryPositions
from custom_components.models.shapes import LlamaShape
from custom_components.models.trained import (
    TokenEmbedding,
    TrainedLinear,
    TrainedTiedLinear,
    train_parameters,
    trained_names,
)
from custom_components.runtime.errors import UserError

T = TypeVar("T")
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

    @property
    def layer(self) -> int | None:
        """The number of the transformer layer; None for the head."""
        return None if self.role == "output" else int(self.name.split(".")[1])


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
        rope = RotaryPositions(shape.head_dim, shape.max_seq_len, shape.rope_base, shape.rope_scaling)
    norm = partial(RMSNorm, shape.embed_dim, shape.norm_eps)
    layers = [
        LlamaLayer(
            attn=_self_attention(shape, f"layers.{index}.attn", linear, rope),
            mlp=_feed_forward(shape, f"layers.{index}.mlp", linear),
            sa_norm=norm(),
            mlp_norm=norm(),
        )
        for index in range(shape.num_layers)
    ]
    tok_embeddings = TokenEmbedding(shape.vocab_size, shape.embed_dim)
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
    query_dim, kv_dim = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    dims = {
        "q_proj": (shape.embed_dim, query_dim),
        "k_proj": (shape.embed_dim, kv_dim),
        "v_proj": (shape.embed_dim, kv_dim),
        "output_proj": (query_dim, shape.embed_dim),
    }
    projections = {
        projection: linear(LinearPlace(f"{name}.{projection}", "attention", in_dim, out_dim))
        for projection, (in_dim, out_dim) in dims.items()
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
        return TrainedTiedLinear(place.tied_to)
    return TrainedLinear(place.in_dim, place.out_dim)


def frozen_linear(place: LinearPlace, quantization: Quantization | None) -> nn.Module:
    """Make a frozen layer for any place, in this format except for the head and odd shapes."""
    if place.tied_to is not None:
        return TiedLinear(place.tied_to)
    return FrozenLinear(place.in_dim, place.out_dim, quantization=_quantization_of(place, quantization))


def full_llama(shape: LlamaShape, train_only: Sequence[str] | None = None) -> TransformerDecoder:
    """Build a Llama-architecture model without adapters, whose own weights are trained.

    Args:
        shape: the model's sizes.
        train_only: patterns of the weights that are trained, see :func:`trained_names`; None: all are.

    Raises:
        UserError: a pattern matches nothing.
    """
    is_trained = trained_names(train_only)

    def linear(place: LinearPlace) -> nn.Module:
        if place.tied_to is not None or is_trained(f"{place.name}.weight"):
            return trained_linear(place)
        return frozen_linear(place, None)

    model = llama(shape, linear)
    train_parameters(model, train_only)
    return model


def _quantization_of(place: LinearPlace, quantization: Quantization | None) -> Quantization | None:
    """Give the format of one layer: the head stays as it is, and so do shapes that the format cannot hold."""
    if quantization is None or place.role == "output":
        return None
    return quantization if can_quantize((place.out_dim, place.in_dim), quantization) else None


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
    quantization: str | None = None,
    adapter_dtype: str | None = None,
    use_rslora: bool = False,
    init_lora_weights: str | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
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
        quantization: the format of those weights: nf4, nf4_single, int8, or none; None: as `quantize_base` says.
        adapter_dtype, use_rslora: see :class:`LoRALinear`.
        init_lora_weights: "pissa": adapters are :class:`PiSSALinear`; None: A is random and B zero.
        rank_pattern, alpha_pattern: rank and alpha of layers that differ from `lora_rank` and `lora_alpha`, by regular
            expressions of the end of a layer's name, Hugging Face's (`layers.0.self_attn.q_proj`) or torchtune's. The
            first that matches counts.
        layers_to_transform: numbers of the layers that have adapters; None: all. The output head is none of them.

    Raises:
        ValueError: for an attention module that does not exist, or a `quantization` at odds with `quantize_base`.
        UserError: for a layer that does not exist, or a pattern that gives no adapter its value.
    """
    adapted_modules = {HUGGING_FACE_SPELLINGS.get(name, name) for name in lora_attn_modules}
    if unknown := adapted_modules - set(ATTENTION_MODULES):
        raise ValueError(f"lora_attn_modules: {sorted(unknown)} are none of {list(ATTENTION_MODULES)}")
    chosen = chosen_quantization(quantize_base, quantization)
    if init_lora_weights not in (None, "pissa") or (init_lora_weights and use_dora):
        raise ValueError(f"init_lora_weights: {init_lora_weights!r} is not null or pissa, which is without use_dora")
    variant = DoRALinear if use_dora else PiSSALinear if init_lora_weights else LoRALinear
    adapted_layers = _adapted_layers(layers_to_transform, shape.num_layers)

    def linear(place: LinearPlace) -> nn.Module:
        is_adapted = {
            "attention": place.layer in adapted_layers and place.name.rpartition(".")[2] in adapted_modules,
            "feed_forward": place.layer in adapted_layers and apply_lora_to_mlp,
            "output": apply_lora_to_output,
        }[place.role]
        if not is_adapted:
            return frozen_linear(place, chosen)
        return variant(
            place.in_dim,
            place.out_dim,
            _value_of(place.name, rank_pattern, lora_rank),
            _value_of(place.name, alpha_pattern, lora_alpha),
            lora_dropout,
            quantization=_quantization_of(place, chosen),
            weight=None if place.tied_to is None else place.tied_to.weight,
            adapter_dtype=adapter_dtype,
            use_rslora=use_rslora,
        )

    model = llama(shape, linear)
    _check_that_patterns_count(model, {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern})
    set_trainable_params(model, get_adapter_params(model))
    if chosen is not None:
        # For torchtune's own recipes, which save the state dict: it has NF4 weights in the compute dtype.
        model._register_state_dict_hook(
            partial(reparametrize_as_dtype_state_dict_post_hook, dtype=model.tok_embeddings.weight.dtype)
        )
    return model


def _adapted_layers(layers_to_transform: int | Sequence[int] | None, num_layers: int) -> Collection[int | None]:
    if layers_to_transform is None:
        return range(num_layers)
    layers = [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform
    if missing := [layer for layer in layers if not 0 <= layer < num_layers]:
        raise UserError(f"layers_to_transform: {missing} are none of the model's layers, 0 to {num_layers - 1}")
    return set(layers)


def _value_of(module: str, patterns: Mapping[str, T] | None, default: T) -> T:
    """Look up the value that patterns give a layer, by torchtune's name of it."""
    pattern = matching_pattern(patterns or {}, (hugging_face_module(module), module))
    return default if pattern is None else (patterns or {})[pattern]


def _check_that_patterns_count(model: nn.Module, patterns_by_key: Mapping[str, Mapping[str, object] | None]) -> None:
    modules = list(adapter_modules(model))
    for key, patterns in patterns_by_key.items():
        matching = {matching_pattern(patterns or {}, (hugging_face_module(module), module)) for module in modules}
        if unused := [pattern for pattern in patterns or {} if pattern not in matching]:
            example = f", such as {hugging_face_module(modules[0])}" if modules else ""
            raise UserError(
                f"{key}: {unused[0]!r} is the first match of no adapted layer; a pattern is a regular expression of "
                f"the end of a layer's name{example}"
            )
