"""Every name of torchtune and torchao in use, with its parameters, so that an upgrade fails here first."""

import importlib
import inspect
import re

import pytest

from tests.support.paths import PROJECT

SURFACE = {
    "torchtune.data.CROSS_ENTROPY_IGNORE_IDX": None,
    "torchtune.data.Message": ["role", "content"],
    "torchtune.models.convert_weights._FROM_HF": None,
    "torchtune.models.convert_weights._FROM_META": None,
    "torchtune.models.convert_weights.get_mapped_key": ["key", "mapping_dict"],
    "torchtune.modules.KVCache": ["batch_size", "max_seq_len", "num_kv_heads", "head_dim", "dtype"],
    "torchtune.modules.RMSNorm": ["dim", "eps"],
    "torchtune.modules.RotaryPositionalEmbeddings": ["dim", "max_seq_len", "base"],
    "torchtune.modules.TiedLinear": ["tied_module"],
    "torchtune.modules.TransformerDecoder": [
        *("tok_embeddings", "layers", "max_seq_len", "num_heads", "head_dim", "norm", "output"),
    ],
    "torchtune.modules.TransformerSelfAttentionLayer": ["attn", "mlp", "sa_norm", "mlp_norm"],
    "torchtune.modules.common_utils.reparametrize_as_dtype_state_dict_post_hook": ["model", "state_dict", "dtype"],
    "torchtune.modules.peft.disable_adapter": ["model"],
    "torchtune.modules.peft.get_adapter_params": ["model"],
    "torchtune.modules.peft.set_trainable_params": ["model", "adapter_params"],
    "torchtune.training.precision.PRECISION_STR_TO_DTYPE": None,
    "torchao.dtypes.nf4tensor.NF4Tensor": [
        *("tensor_meta", "block_size", "n_blocks", "scaler_block_size", "quantized_scalers"),
        *("quantization_factor", "scaler_mean", "quantized_data", "nf4"),
    ],
    "torchao.quantization.Int8Tensor": None,
    "torchao.quantization.PerRow": [],
    "torchao.dtypes.nf4tensor.SubclassTensorArgs": [
        *("original_shape", "original_strides", "storage_offset", "dtype", "device", "requires_grad"),
    ],
}


@pytest.mark.parametrize("path", SURFACE)
def test_name_and_signature(path):
    module, _, name = path.rpartition(".")
    target = getattr(importlib.import_module(module), name)
    if SURFACE[path] is not None:
        parameters = inspect.signature(target).parameters
        assert [expected for expected in SURFACE[path] if expected not in parameters] == []


def test_every_name_in_use_is_listed():
    used = set()
    for folder in ("custom_components", "recipes", "examples"):
        for path in (PROJECT / folder).rglob("*.py"):
            imports = re.findall(
                r"^\s*from (torch(?:tune|ao)[\w.]*) import (\([^)]*\)|.*)", path.read_text(), re.MULTILINE
            )
            for module, names in imports:
                used |= {f"{module}.{name.strip()}" for name in names.strip("()").split(",") if name.strip()}
    assert used - set(SURFACE) == set()
