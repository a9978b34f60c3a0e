"""An adapter alone as a GGUF file: its update of every weight is the one that is merged."""

from pathlib import Path
from typing import Any

import pytest
import torch

from custom_components.export.merged_weights import read_adapter
from custom_components.models.lora import merged_weight
from custom_components.weights.adapter_files import open_adapter
from custom_components.weights.checkpoint_files import open_checkpoint
from tests.support.adapters import saved_adapter
from tests.support.models import loaded_model, with_random_variants
from tests.support.recipe_runs import run_merge

gguf = pytest.importorskip("gguf")

# Of ggml's docs/gguf.md, "Standardized tensor names".
NAMES = {
    **{"attn.q_proj": "attn_q", "attn.k_proj": "attn_k", "attn.v_proj": "attn_v", "attn.output_proj": "attn_output"},
    **{"mlp.w1": "ffn_gate", "mlp.w2": "ffn_down", "mlp.w3": "ffn_up"},
}


def exported(make_checkpoint, tmp_path: Path, tied: bool = False, **lora: Any) -> tuple[Path, Path, tuple]:
    checkpoint = make_checkpoint(tie_word_embeddings=tied)
    adapter = saved_adapter(
        with_random_variants(loaded_model(checkpoint, lora_alpha=7.0, **lora)), tmp_path / "adapter"
    )
    output = tmp_path / "out"
    return (
        checkpoint,
        adapter,
        run_merge(checkpoint_dir=checkpoint, adapter_dir=adapter, output_dir=output, format="gguf_lora"),
    )


def llama_cpp_updates(path: Path) -> dict[str, torch.Tensor]:
    """What llama.cpp adds to each weight: alpha / rank times B A (src/llama-adapter.h, `get_scale`)."""
    reader = gguf.GGUFReader(path)
    fields = {key: reader.get_field(key).contents() for key in ("general.type", "adapter.type", "general.architecture")}
    assert fields == {"general.type": "adapter", "adapter.type": "lora", "general.architecture": "llama"}
    alpha = reader.get_field("adapter.lora.alpha").contents()
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    names = {name.removesuffix(".lora_a").removesuffix(".lora_b") for name in tensors}
    assert len(tensors) == 2 * len(names)
    return {
        name: alpha / tensors[f"{name}.lora_b"].shape[1] * tensors[f"{name}.lora_b"] @ tensors[f"{name}.lora_a"]
        for name in names
    }


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True, "apply_lora_to_output": True},
        {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}, "layers_to_transform": [1]},
        {"lora_attn_modules": ["q_proj"], "apply_lora_to_mlp": False, "lora_rank": 8},
    ],
)
def test_the_update_of_every_weight_is_the_merged_one(make_checkpoint, tmp_path, lora):
    checkpoint, adapter, (code, out, err) = exported(make_checkpoint, tmp_path, **lora)
    assert code == 0, err
    assert "--lora out-lora.gguf" in out
    updates = llama_cpp_updates(tmp_path / "out" / "out-lora.gguf")
    modules = read_adapter(open_checkpoint(checkpoint), open_adapter(adapter)).modules
    for module_name, module in modules.items():
        if module_name == "output":
            name = "output.weight"
        else:
            _, layer, rest = module_name.split(".", 2)
            name = f"blk.{layer}.{NAMES[rest]}.weight"
        zeros = torch.zeros(module.out_dim, module.in_dim)
        torch.testing.assert_close(updates.pop(name), merged_weight(zeros, [(1.0, module)]), atol=1e-6, rtol=1e-5)
    assert not updates


@pytest.mark.parametrize(
    ("tied", "lora", "words"),
    [(False, {"use_dora": True}, "no DoRA"), (True, {"apply_lora_to_output": True}, "output head that is the base's")],
)
def test_what_llama_cpp_cannot_compute_is_refused(make_checkpoint, tmp_path, tied, lora, words):
    _, _, (code, _, err) = exported(make_checkpoint, tmp_path, tied, **lora)
    assert code == 2 and words in err and "format=gguf" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            {"adapter_dir": "null", "adapters": "[{dir: a, weight: 0.5}]"},
            "adapters: format=gguf_lora writes one adapter",
        ),
        ({"base": "dequantized"}, "base: format=gguf_lora writes one adapter"),
        ({"quantization": "q8_0"}, "set format=gguf"),
        ({"dtype": "bf16"}, "is of Hugging Face directories"),
    ],
)
def test_L26_settings_that_have_no_effect_are_refused(overrides, words):
    code, _, err = run_merge(format="gguf_lora", **overrides)
    assert code == 2 and words in err
