"""A pytest plugin for torchtune's own test suite: our classes and builders under torchtune's names.

Arguments that are not ours (a bias, dropout of attention, other NF4 blocks, ...) skip the test that gives them, with
the argument as the reason. With TORCHTUNE_S_OWN=1 in the environment the classes are torchtune's, to see which tests
do not pass with them either; with NF4_ROUNDED_ONCE=1 torchao dequantizes weights to the values that our products take.
Used by tests/models/test_torchtune_suite.py.
"""

import importlib
import importlib.util
import os
import sys
import unittest
from types import ModuleType
from typing import Any

import pytest
import torchtune.models.llama2
import torchtune.models.llama2._component_builders
import torchtune.modules
import torchtune.modules.peft
import torchtune.modules.position_embeddings
import torchtune.modules.rms_norm
from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune.models.llama2._model_utils import scale_hidden_dim_for_mlp
from torchtune.modules import KVCache

from custom_components.models import nf4
from custom_components.models.attention import SelfAttention
from custom_components.models.builders import full_llama
from custom_components.models.dora import DoRALinear
from custom_components.models.feed_forward import FeedForward
from custom_components.models.llama import lora_llama
from custom_components.models.lora import LoRALinear, adapter_modules
from custom_components.models.rms_norm import RMSNorm
from custom_components.models.rotary import RotaryPositions
from custom_components.models.shapes import LlamaShape


def skip_unless(values: dict[str, Any], **ours: Any) -> None:
    """Skip the test where one of `values` is not the only value that we have."""
    for name, value in values.items():
        if name not in ours or value != ours[name]:
            pytest.skip(f"{name}={value!r} is not an argument of ours")


class _OurName(type):
    """Makes a class whose calls make one of ours, and whose instances are ours."""

    ours: type

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls.ours)

    def __call__(
        cls,
        in_dim: int,
        out_dim: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        use_bias: bool = False,
        quantize_base: bool = False,
        **others: Any,
    ) -> Any:
        skip_unless({"use_bias": use_bias, **others}, use_bias=False)
        return cls.ours(in_dim, out_dim, rank, alpha, dropout, quantize_base=quantize_base)


class TorchtuneLoRALinear(metaclass=_OurName):
    ours = LoRALinear


class TorchtuneDoRALinear(metaclass=_OurName):
    ours = DoRALinear


def shape(
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    max_seq_len: int,
    intermediate_dim: int | None = None,
    norm_eps: float = 1e-5,
    **others: Any,
) -> LlamaShape:
    skip_unless(others, attn_dropout=0.0)
    wide = intermediate_dim or scale_hidden_dim_for_mlp(embed_dim)
    return LlamaShape(vocab_size, num_layers, num_heads, num_kv_heads, embed_dim, wide, max_seq_len, norm_eps=norm_eps)


def llama2(**sizes: Any) -> nn.Module:
    return full_llama(shape(**sizes))


def lora_llama2(
    lora_attn_modules: list[str],
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    **sizes_and_lora: Any,
) -> Any:
    names = ("lora_rank", "lora_alpha", "lora_dropout", "use_dora", "quantize_base")
    lora = {name: sizes_and_lora.pop(name) for name in names if name in sizes_and_lora}
    return lora_llama(shape(**sizes_and_lora), lora_attn_modules, apply_lora_to_mlp, apply_lora_to_output, **lora)


def lora_llama2_self_attention(lora_modules: list[str], **sizes_and_lora: Any) -> Any:
    if not lora_modules:
        pytest.skip("lora_modules=[] is an error of torchtune's, and none of ours: adapters may be elsewhere")
    return lora_llama2(lora_modules, vocab_size=8, num_layers=1, **sizes_and_lora).layers[0].attn


def llama2_mlp(dim: int, hidden_dim: int) -> nn.Module:
    sizes = ((dim, hidden_dim), (hidden_dim, dim), (dim, hidden_dim))
    gate, down, up = (nn.Linear(*size, bias=False) for size in sizes)
    return FeedForward(gate_proj=gate, down_proj=down, up_proj=up)


def multi_head_attention(
    *,
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_seq_len: int,
    kv_cache: KVCache | None = None,
    q_proj: nn.Module,
    k_proj: nn.Module,
    v_proj: nn.Module,
    output_proj: nn.Module,
    pos_embeddings: nn.Module,
    **others: Any,
) -> Any:
    skip_unless(others, is_causal=True, attn_dropout=0.0)
    attention = SelfAttention(
        LlamaShape(8, 1, num_heads, num_kv_heads, embed_dim, 8, max_seq_len),
        q_proj=q_proj,
        k_proj=k_proj,
        v_proj=v_proj,
        output_proj=output_proj,
        pos_embeddings=pos_embeddings,
    )
    assert attention.head_dim == head_dim
    attention.kv_cache = kv_cache
    return attention


OURS: dict[ModuleType, dict[str, Any]] = {
    torchtune.modules.peft: {"LoRALinear": TorchtuneLoRALinear, "DoRALinear": TorchtuneDoRALinear},
    torchtune.models.llama2: {"llama2": llama2, "lora_llama2": lora_llama2},
    torchtune.models.llama2._component_builders: {
        "llama2_mlp": llama2_mlp,
        "lora_llama2_self_attention": lora_llama2_self_attention,
    },
    torchtune.modules: {
        "FeedForward": FeedForward,
        "MultiHeadAttention": multi_head_attention,
        "RMSNorm": RMSNorm,
        "RotaryPositionalEmbeddings": RotaryPositions,
    },
    torchtune.modules.position_embeddings: {"RotaryPositionalEmbeddings": RotaryPositions},
    torchtune.modules.rms_norm: {"RMSNorm": RMSNorm},
}


def pytest_configure() -> None:
    if importlib.util.find_spec("expecttest") is None:
        # torch's own base class of tests for several GPUs imports it.
        sys.modules["expecttest"] = ModuleType("expecttest")
        vars(sys.modules["expecttest"])["TestCase"] = unittest.TestCase
    if "TORCHTUNE_S_OWN" in os.environ:
        return
    for module, names in OURS.items():
        for name, ours in names.items():
            assert hasattr(module, name)
            setattr(module, name, ours)
    if "NF4_ROUNDED_ONCE" in os.environ:
        NF4Tensor.get_original_weight = lambda weight: nf4.dequantize(weight, weight.dtype)
    setattr(LoRALinear, "_quantize_base", property(lambda layer: layer.quantize_base))  # noqa: B010
    test_utils: Any = importlib.import_module("tests.test_utils")  # torchtune's
    fixed_init_model = test_utils.fixed_init_model

    def told_fixed_init_model(model: nn.Module, *arguments: Any, **settings: Any) -> None:
        """Tell layers that their weight was written in place, as ours want it."""
        fixed_init_model(model, *arguments, **settings)
        layers = [model] if isinstance(model, LoRALinear) else adapter_modules(model).values()
        for layer in layers:
            layer.base_changed()

    test_utils.fixed_init_model = told_fixed_init_model
