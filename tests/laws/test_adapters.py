"""Adapters in PEFT's format. L20, L21, L24."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from custom_components import nf4
from custom_components.adapters import (
    PromptFormat,
    base_model_name,
    check_adapter_was_trained,
    load_adapter,
    load_model_for_inference,
    lora_settings,
    read_prompt_format,
    save_adapter,
)
from custom_components.errors import UserError
from tests.conftest import ALL_ATTENTION, CPU, loaded_model, with_random_adapters

PROMPT_FORMAT = PromptFormat("llama2", "Be kind.", ["</s>"])
TOKENS = torch.randint(512, (2, 30), generator=torch.Generator().manual_seed(0))


def saved_adapter(model, directory):
    save_adapter(model, directory, "a/base", PROMPT_FORMAT)
    return directory


@pytest.mark.parametrize(
    "lora",
    [
        {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": False},
        {"lora_attn_modules": ALL_ATTENTION, "apply_lora_to_mlp": True, "apply_lora_to_output": True},
        {"lora_attn_modules": [], "apply_lora_to_mlp": True},
    ],
)
def test_L20_a_saved_adapter_is_the_one_in_memory(make_checkpoint, tmp_path, lora):
    checkpoint = make_checkpoint()
    model = with_random_adapters(loaded_model(checkpoint, lora_rank=3, lora_alpha=5.0, **lora)).eval()
    adapter = saved_adapter(model, tmp_path / "adapter")
    reloaded = load_model_for_inference(checkpoint, adapter, False, torch.float32, CPU)
    parameters = dict(reloaded.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, parameters[name]), name
    assert torch.equal(model(TOKENS), reloaded(TOKENS))
    assert read_prompt_format(adapter) == PROMPT_FORMAT


def test_L20_an_adapter_that_learned_nothing_is_an_error(make_checkpoint):
    model = loaded_model(make_checkpoint())
    with pytest.raises(UserError, match="every B of the adapter is still zero"):
        check_adapter_was_trained(model)
    check_adapter_was_trained(with_random_adapters(model))
    model.layers[0].attn.q_proj.lora_b.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"layers\.0\.attn\.q_proj is not finite"):
        check_adapter_was_trained(model)


@pytest.mark.parametrize("quantize_base", [False, True])
@pytest.mark.parametrize("name", ["stories260K", "random"])
def test_L21_the_adapter_in_peft_gives_the_same_logits(make_checkpoint, test_data, tmp_path, peft, name, quantize_base):
    """For QLoRA, on transformers' model with the dequantized weights."""
    transformers = pytest.importorskip("transformers")
    checkpoint = make_checkpoint() if name == "random" else test_data("stories260K/config.json").parent
    model = with_random_adapters(loaded_model(checkpoint, quantize_base=quantize_base, lora_alpha=7.0)).eval()
    adapter = saved_adapter(model, tmp_path / "adapter")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if quantize_base:
        for parameter_name, parameter in theirs.named_parameters():
            if "_proj" in parameter_name:
                # As the loader quantizes them: in torchtune's row order, which decides what shares a block.
                parameter.data = dequantized_in_hugging_face_order(model, parameter_name)
    theirs = peft.PeftModel.from_pretrained(theirs, adapter)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=0)


def dequantized_in_hugging_face_order(model, parameter_name):
    from custom_components.adapters import _HF_NAMES
    from custom_components.checkpoint_files import halve_rope_rows

    layer = parameter_name.split(".")[2]
    tune_name = next(tune for tune, hf in _HF_NAMES.items() if hf.format(layer) == parameter_name).format(layer)
    weight = nf4.dequantize(model.get_parameter(tune_name), torch.float32)
    if "q_proj" in tune_name:
        return halve_rope_rows(weight, model.num_heads)
    if "k_proj" in tune_name:
        return halve_rope_rows(weight, model.layers[0].attn.num_kv_heads)
    return weight


def test_an_adapter_that_peft_wrote_loads(make_checkpoint, tmp_path, peft):
    transformers = pytest.importorskip("transformers")
    checkpoint = make_checkpoint()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    config = peft.LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "k_proj", "o_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(theirs, config)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_model_for_inference(checkpoint, tmp_path / "theirs", False, torch.float32, CPU)
    assert read_prompt_format(tmp_path / "theirs") is None
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=0)


def test_L24_an_adapter_of_another_model_rank_or_targets(make_checkpoint, tmp_path):
    adapter = saved_adapter(with_random_adapters(loaded_model(make_checkpoint("base"))), tmp_path / "adapter")
    wider = make_checkpoint("wider", hidden_size=128)
    with pytest.raises(UserError, match=r"lora_A\.weight has shape \(4, 64\), the model \(4, 128\)"):
        load_model_for_inference(wider, adapter, False, torch.float32, CPU)
    with pytest.raises(UserError, match=r"has shape \(4, 64\), the model \(2, 64\)"):
        load_adapter(loaded_model(make_checkpoint("ranks"), lora_rank=2), adapter)
    with pytest.raises(UserError, match=r"mlp\.down_proj\.lora_A\.weight has no place in the model"):
        load_adapter(loaded_model(make_checkpoint("targets"), apply_lora_to_mlp=False), adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj\.lora_B\.weight is missing"):
        load_adapter(loaded_model(make_checkpoint("missing")), adapter)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_modules": ["gate_proj"]}, "not all three"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ],
)
def test_adapters_that_cannot_be_built_are_refused_by_name(tmp_path, changes, words):
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | changes
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        lora_settings(tmp_path)


def test_the_base_is_named_as_it_was_downloaded(tmp_path):
    assert base_model_name(tmp_path) == str(tmp_path)
    (tmp_path / "original_repo_id.json").write_text('{"repo_id": "meta-llama/Llama-2-7b-hf"}')
    assert base_model_name(tmp_path) == "meta-llama/Llama-2-7b-hf"
