"""Every kind of LoRA adapter that PEFT writes: loaded with PEFT's logits, or refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from custom_components.export.merged_weights import read_adapter
from custom_components.runtime.errors import UserError
from custom_components.weights.adapter_files import open_adapter
from custom_components.weights.adapters import save_adapter
from custom_components.weights.checkpoint_files import open_checkpoint
from tests.support.adapters import WEIGHTS, assert_same_logits
from tests.support.models import inference_model

LOADED = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "DoRA and rsLoRA": {"use_dora": True, "use_rslora": True, "target_modules": "all-linear"},
    "a fraction for alpha": {"lora_alpha": 4.5},
    "dropout": {"lora_dropout": 0.3},
    "all linear layers": {"target_modules": "all-linear"},
    "but for some": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.1.mlp.up_proj"]},
    "but for a pattern": {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*"},
    "a regular expression": {"target_modules": r"model\.layers\.1\..*\.(k|o)_proj"},
    "whole names": {"target_modules": ["model.layers.1.self_attn.k_proj", "layers.0.mlp.down_proj"]},
    "the output head": {"target_modules": ["q_proj", "lm_head"]},
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0]},
    "layers and the head": {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]},
    "layers of a list": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "layers of lists": {"layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
    "a layer by its whole name": {
        "target_modules": ["model.layers.0.self_attn.q_proj", "k_proj"],
        "layers_to_transform": [1],
    },
    "ranks by name": {"rank_pattern": {"q_proj": 5}},
    "ranks by pattern": {"rank_pattern": {r".*layers\.1\..*": 2, "k_proj": 7}, "target_modules": "all-linear"},
    "ranks that nothing has": {"rank_pattern": {"up_proj": 5}},
    "alphas by pattern": {"alpha_pattern": {"^model.layers.0.self_attn.k_proj": 3, r"layers\.\d\.self_attn.q_proj": 5}},
    "both": {"rank_pattern": {"k_proj": 5}, "alpha_pattern": {"k_proj": 2.5}, "use_rslora": True},
    "both and DoRA": {"rank_pattern": {"layers.1.self_attn.k_proj": 5}, "alpha_pattern": {"q": 2}, "use_dora": True},
    "biases that Llama has not": {"bias": "lora_only"},
    "all biases that Llama has not": {"bias": "all"},
    "modules to save as they were": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norms to save as they were": {"modules_to_save": ["norm", "input_layernorm"]},
    "a module to save and to adapt": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    "rows of tokens": {"trainable_token_indices": [5, 7]},
    "rows of tokens by matrix": {"trainable_token_indices": {"embed_tokens": [7, 5], "lm_head": [9]}, "use_dora": True},
    "rows of tokens beside an adapted head": {"target_modules": ["lm_head"], "trainable_token_indices": [1023]},
    "gaussian values": {"init_lora_weights": "gaussian"},
    "orthogonal values": {"init_lora_weights": "orthogonal", "r": 4},
    "minor components": {"init_lora_weights": "mica"},
}
REFUSED = {
    "principal components": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
    "QR factors": ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    "biases of B": ({"lora_bias": True}, "lora_bias is True"),
    "the embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.lora_embedding_A' has no place"),
    "a linear layer to save": ({"modules_to_save": ["v_proj"]}, r"v_proj.weight' has no place .* modules_to_save"),
    "replicated layers": ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication is"),
    "tokens that invoke": ({"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens is"),
}


@pytest.mark.parametrize("kind", LOADED)
def test_an_adapter_gives_peft_s_logits(make_checkpoint, tmp_path, peft_model, kind):
    checkpoint = make_checkpoint()
    theirs = peft_model(checkpoint, **LOADED[kind])
    theirs.save_pretrained(tmp_path / "theirs")
    model = assert_same_logits(checkpoint, tmp_path / "theirs", theirs)
    assert read_adapter(open_checkpoint(checkpoint), open_adapter(tmp_path / "theirs")).modules
    # And back: saved here it is the same adapter.
    save_adapter(model, tmp_path / "ours", "a/base", {})
    assert_same_logits(checkpoint, tmp_path / "ours", theirs)


def test_rows_beside_an_adapter_on_a_tied_head_are_refused(make_checkpoint, tmp_path, peft_model):
    checkpoint = make_checkpoint(tie_word_embeddings=True)
    peft_model(checkpoint, **LOADED["rows of tokens beside an adapted head"]).save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="output head, which has an adapter as well"):
        inference_model(checkpoint, tmp_path / "theirs")


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_loaded_is_refused_by_name(make_checkpoint, tmp_path, peft_model, kind):
    config, words = REFUSED[kind]
    checkpoint = make_checkpoint()
    peft_model(checkpoint, **config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match=words):
        inference_model(checkpoint, tmp_path / "theirs")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}], ids=str)
def test_trained_embeddings_are_refused_with_the_way_out(make_checkpoint, tmp_path, peft_model, config, tied):
    """Those that were resized as well: the rows that both have are compared."""
    checkpoint = make_checkpoint(tie_word_embeddings=tied)
    for num_embeddings in (1024, 1025):
        if not config and num_embeddings == 1024:
            continue  # PEFT stores none
        theirs = peft_model(checkpoint, num_embeddings, **config)
        with torch.no_grad():
            theirs.get_input_embeddings().weight[7] += 0.1
        theirs.save_pretrained(tmp_path / f"{num_embeddings}")
        with pytest.raises(UserError, match="it is not checkpoint_dir's.* here single tokens are .* trainable_tokens"):
            inference_model(checkpoint, tmp_path / f"{num_embeddings}")


@pytest.mark.parametrize("entry", [{"bias": None}, {"rank_pattern": None, "modules_to_save": []}], ids=str)
def test_entries_without_a_value_say_nothing(make_checkpoint, tmp_path, peft_model, entry):
    checkpoint = make_checkpoint()
    theirs = peft_model(checkpoint)
    theirs.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entry))
    assert_same_logits(checkpoint, tmp_path / "theirs", theirs)


def test_a_bias_in_the_file_is_refused(make_checkpoint, tmp_path, peft_model):
    checkpoint = make_checkpoint()
    peft_model(checkpoint, bias="lora_only").save_pretrained(tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs" / WEIGHTS)
    stored["base_model.model.model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    save_file(stored, tmp_path / "theirs" / WEIGHTS)
    with pytest.raises(UserError, match=r"q_proj\.bias' has no place"):
        open_adapter(tmp_path / "theirs")


def test_a_rank_other_than_its_pattern_s_is_refused(make_checkpoint, tmp_path, peft_model):
    checkpoint = make_checkpoint()
    peft_model(checkpoint, rank_pattern={"q_proj": 5}).save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": {"q_proj": 4}}))
    with pytest.raises(UserError, match=r"q_proj\.lora_A\.weight has shape \(5, 64\), the model \(4, 64\)"):
        inference_model(checkpoint, tmp_path / "theirs")


def test_a_trainer_s_folder_is_pointed_to_its_newest_checkpoint(make_checkpoint, tmp_path, peft_model):
    checkpoint = make_checkpoint()
    theirs = peft_model(checkpoint)
    for step in (500, 1000):
        theirs.save_pretrained(tmp_path / f"outputs/checkpoint-{step}")
        torch.save({}, tmp_path / f"outputs/checkpoint-{step}/optimizer.pt")
    with pytest.raises(UserError, match="has no adapter_config.json; name .*outputs/checkpoint-1000$"):
        open_adapter(tmp_path / "outputs")
    assert_same_logits(checkpoint, tmp_path / "outputs/checkpoint-500", theirs)
