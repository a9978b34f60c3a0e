"""Adapters that torchtune's checkpointer wrote, read here."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torchtune import training
from torchtune.models.llama2 import lora_llama2
from torchtune.modules.peft import get_adapter_state_dict, get_lora_module_names

from custom_components.runtime.errors import UserError
from custom_components.weights.adapter_files import open_adapter
from tests.support.adapters import WEIGHTS, assert_same_logits


@pytest.mark.parametrize(
    "lora",
    [
        {"lora_attn_modules": ["q_proj", "k_proj"]},
        {"lora_attn_modules": ["k_proj", "output_proj"], "apply_lora_to_mlp": True, "apply_lora_to_output": True},
        {"lora_attn_modules": ["q_proj", "k_proj", "v_proj"], "use_dora": True},
    ],
)
@pytest.mark.parametrize("safe_serialization", [True, False])
def test_what_torchtune_s_checkpointer_wrote_gives_torchtune_s_logits(
    make_checkpoint, tmp_path, lora, safe_serialization
):
    checkpoint = make_checkpoint(num_key_value_heads=4)
    model = torchtune_model(checkpoint, lora)
    save_with_torchtune(model, checkpoint, tmp_path / "run", lora, safe_serialization=safe_serialization)
    epoch = tmp_path / "run/epoch_1"
    assert (epoch / "adapter_model.pt").exists()
    assert_same_logits(checkpoint, epoch, model)
    # Its .pt alone, as older versions named it, and its state dict as safetensors.
    for name in (WEIGHTS, "adapter_model.bin"):
        (epoch / name).unlink(missing_ok=True)
    (epoch / "adapter_model.pt").rename(epoch / "adapter_10.pt")
    shutil.copy(checkpoint / "model.safetensors", epoch / "adapter_9.pt")  # an older epoch: not looked at
    assert_same_logits(checkpoint, epoch, model)
    save_file(torch.load(epoch / "adapter_10.pt", weights_only=True), epoch / "adapter_3.safetensors")
    (epoch / "adapter_10.pt").unlink()
    (epoch / "adapter_9.pt").unlink()
    assert_same_logits(checkpoint, epoch, model)


def torchtune_model(checkpoint, lora):
    config = json.loads((checkpoint / "config.json").read_text())
    model = lora_llama2(
        **{"apply_lora_to_mlp": False, "apply_lora_to_output": False, "use_dora": False} | lora,
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        embed_dim=config["hidden_size"],
        intermediate_dim=config["intermediate_size"],
        max_seq_len=config["max_position_embeddings"],
        norm_eps=config["rms_norm_eps"],
        lora_rank=4,
        lora_alpha=6,
    )
    checkpointer = torchtune_checkpointer(checkpoint, checkpoint.parent / "unused")
    model.load_state_dict(checkpointer.load_checkpoint()[training.MODEL_KEY], strict=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "initialize_dora_magnitude"):
                module.initialize_dora_magnitude()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
    return model.eval()


def torchtune_checkpointer(checkpoint, output_dir, **settings):
    return training.FullModelHFCheckpointer(
        checkpoint_dir=str(checkpoint),
        checkpoint_files=["model.safetensors"],
        model_type="LLAMA2",
        output_dir=str(output_dir),
        **settings,
    )


def save_with_torchtune(model, checkpoint, output_dir, lora, **settings):
    """As `save_checkpoint` of its recipes/lora_finetune_single_device.py, with save_adapter_weights_only."""
    state = {
        training.ADAPTER_KEY: get_adapter_state_dict(model.state_dict()),
        training.ADAPTER_CONFIG: {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": get_lora_module_names(
                lora["lora_attn_modules"],
                lora.get("apply_lora_to_mlp", False),
                lora.get("apply_lora_to_output", False),
            ),
            "peft_type": "LORA",
        },
    }
    checkpointer = torchtune_checkpointer(checkpoint, output_dir, **settings)
    checkpointer.save_checkpoint(state, epoch=1, adapter_only=True)


def test_torchtune_s_conversion_of_dora_is_refused_on_its_own(make_checkpoint, tmp_path):
    """It forgets to reorder the magnitudes of q and k; with the .pt beside it that is read instead."""
    checkpoint = make_checkpoint(num_key_value_heads=4)
    lora = {"lora_attn_modules": ["q_proj"], "use_dora": True}
    save_with_torchtune(torchtune_model(checkpoint, lora), checkpoint, tmp_path / "run", lora)
    (tmp_path / "run/epoch_1/adapter_model.pt").unlink()
    with pytest.raises(UserError, match="torchtune's conversion.*put its adapter_model.pt beside it"):
        open_adapter(tmp_path / "run/epoch_1")


def test_directories_of_torchtune_that_are_not_an_adapter_s(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint(num_key_value_heads=4)
    lora = {"lora_attn_modules": ["q_proj"]}
    save_with_torchtune(torchtune_model(checkpoint, lora), checkpoint, tmp_path / "run", lora)
    with pytest.raises(UserError, match="has no adapter_config.json; name .*/run/epoch_1"):
        open_adapter(tmp_path / "run")
    (tmp_path / "run/epoch_1/adapter_config.json").unlink()
    with pytest.raises(UserError, match="holds an adapter without adapter_config.json; write one with r, lora_alpha"):
        open_adapter(tmp_path / "run/epoch_1")
