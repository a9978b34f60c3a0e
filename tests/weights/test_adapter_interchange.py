"""Adapters that PEFT wrote, read here."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from custom_components.export.merged_weights import read_adapter
from custom_components.runtime.errors import UserError
from custom_components.transforms.prompt_format import PromptFormat, read_prompt_format
from custom_components.weights.adapted_model import lora_settings
from custom_components.weights.adapter_files import open_adapter
from custom_components.weights.adapters import check_adapter_fits, copy_into_adapter, load_adapter, save_adapter
from custom_components.weights.checkpoint_files import open_checkpoint
from custom_components.weights.peft_format import read_peft_config
from tests.support.adapters import WEIGHTS, assert_same_logits
from tests.support.models import TOKENS, inference_model, loaded_model


def rewrite_config(adapter_dir, **changes):
    path = adapter_dir / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_dora": True, "use_rslora": True, "target_modules": ["k_proj", "gate_proj", "lm_head"]},
        {"target_modules": r".*\.(q_proj|k_proj|up_proj)|lm_head"},
        {"target_modules": ["gate_proj", "down_proj", "v_proj"]},
    ],
    ids=str,
)
def test_an_adapter_of_a_tied_model_gives_peft_s_logits(make_checkpoint, tmp_path, peft_model, config):
    """Those of an untied one: test_peft_matrix.py."""
    checkpoint = make_checkpoint(tie_word_embeddings=True)
    theirs = peft_model(checkpoint, **config)
    theirs.save_pretrained(tmp_path / "theirs")
    model = assert_same_logits(checkpoint, tmp_path / "theirs", theirs)
    assert read_prompt_format(tmp_path / "theirs") is None
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    adapted = read_adapter(open_checkpoint(checkpoint), open_adapter(tmp_path / "theirs")).modules
    assert len(adapted) == len([name for name, _ in theirs.named_modules() if name.endswith("lora_A.default")])


def test_target_modules_of_all_linear_as_the_word(make_checkpoint, tmp_path, peft_model):
    """PEFT writes the names that it stands for; others write the word."""
    checkpoint = make_checkpoint()
    theirs = peft_model(checkpoint, target_modules="all-linear")
    theirs.save_pretrained(tmp_path / "theirs")
    rewrite_config(tmp_path / "theirs", target_modules="all-linear")
    assert_same_logits(checkpoint, tmp_path / "theirs", theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_adapter_is_loaded_to_fp32(make_checkpoint, tmp_path, peft_model, dtype):
    checkpoint = make_checkpoint()
    theirs = peft_model(checkpoint, target_modules=["q_proj", "lm_head"])
    for parameter in (parameter for name, parameter in theirs.named_parameters() if "lora_" in name):
        parameter.data = parameter.data.to(dtype).float()
    theirs.save_pretrained(tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs" / WEIGHTS)
    # The head that PEFT saves along comes in the dtype it was trained in, and is the checkpoint's up to that rounding.
    save_file({key: tensor.to(dtype) for key, tensor in stored.items()}, tmp_path / "theirs" / WEIGHTS)
    model = assert_same_logits(checkpoint, tmp_path / "theirs", theirs)
    assert model.layers[0].attn.q_proj.lora_a.weight.dtype == torch.float32


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_peft_saved_along_has_to_be_the_checkpoint_s(make_checkpoint, tmp_path, peft_model, tied):
    checkpoint = make_checkpoint(tie_word_embeddings=tied)
    theirs = peft_model(checkpoint, target_modules=["q_proj", "lm_head"])
    theirs.save_pretrained(tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs" / WEIGHTS)
    assert "base_model.model.lm_head.base_layer.weight" in stored
    stored["base_model.model.lm_head.base_layer.weight"][5] += 0.1
    save_file(stored, tmp_path / "theirs" / WEIGHTS)
    words = r"output\.weight of its base model, and it is not checkpoint_dir's"
    with pytest.raises(UserError, match=words):
        inference_model(checkpoint, tmp_path / "theirs")
    with pytest.raises(UserError, match=words):
        read_adapter(open_checkpoint(checkpoint), open_adapter(tmp_path / "theirs"))
    model = loaded_model(checkpoint, **lora_settings(open_adapter(tmp_path / "theirs")))
    with pytest.raises(UserError, match=words):
        load_adapter(model, open_adapter(tmp_path / "theirs"))


def without_prefix(key):
    return key.removeprefix("base_model.model.")


def with_the_adapter_s_name(key):
    return key.replace(".weight", ".default.weight").replace("magnitude_vector", "magnitude_vector.default.weight")


def of_a_compiled_model(key):
    return key.replace("base_model.model.", "base_model.model._orig_mod.")


@pytest.mark.parametrize("spelling", [str, without_prefix, with_the_adapter_s_name, of_a_compiled_model])
@pytest.mark.parametrize("as_bin", [False, True])
def test_every_spelling_and_file_that_peft_writes(make_checkpoint, tmp_path, peft_model, spelling, as_bin):
    checkpoint = make_checkpoint()
    theirs = peft_model(checkpoint, use_dora=True)
    theirs.save_pretrained(tmp_path / "theirs")
    stored = {spelling(key): tensor for key, tensor in load_file(tmp_path / "theirs" / WEIGHTS).items()}
    if as_bin:
        (tmp_path / "theirs" / WEIGHTS).unlink()
        torch.save(stored, tmp_path / "theirs/adapter_model.bin")
    else:
        save_file(stored, tmp_path / "theirs" / WEIGHTS)
    assert_same_logits(checkpoint, tmp_path / "theirs", theirs)


def test_the_spellings_are_those_that_are_written(make_checkpoint, tmp_path, peft, peft_model):
    """The keys of the test above, from the libraries themselves."""
    transformers = pytest.importorskip("transformers")
    checkpoint = make_checkpoint()
    plain = peft_model(checkpoint)
    plain.save_pretrained(tmp_path / "plain", safe_serialization=False)
    keys = set(torch.load(tmp_path / "plain/adapter_model.bin", weights_only=True))
    assert {with_the_adapter_s_name(key) for key in keys} <= set(plain.state_dict())
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    base.add_adapter(peft.LoraConfig(r=3, target_modules=["q_proj", "k_proj"]))
    base.save_pretrained(tmp_path / "unprefixed", save_peft_format=False)
    assert set(load_file(tmp_path / "unprefixed" / WEIGHTS)) == {without_prefix(key) for key in keys}
    compiled = torch.compile(transformers.AutoModelForCausalLM.from_pretrained(checkpoint))
    compiled = peft.get_peft_model(compiled, peft.LoraConfig(r=3, target_modules=["q_proj", "k_proj"]))
    compiled.save_pretrained(tmp_path / "compiled")
    assert set(load_file(tmp_path / "compiled" / WEIGHTS)) == {of_a_compiled_model(key) for key in keys}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the base"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj: 0 should be greater than 0"),
        ({"rank_pattern": {"(q_proj": 2}}, "should be a regular expression"),
        ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern: \['q_proj'\] should be"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": 0}, "r: 0 should be greater than 0"),
        ({"lora_alpha": "16"}, "lora_alpha: '16' should be"),
        ({"lora_alpha": True}, "lora_alpha: True should be"),
        ({"target_modules": []}, r"target_modules: \[\] should be"),
        ({"target_modules": "(q_proj"}, "should be a regular expression"),
    ],
)
def test_adapters_that_cannot_be_built_are_refused_in_one_line(tmp_path, changes, words):
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | changes
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words) as error:
        open_adapter(tmp_path)
    assert str(tmp_path / "adapter_config.json") in str(error.value) and "\n" not in str(error.value)


def test_adapters_on_embeddings_are_refused_by_name(make_checkpoint, tmp_path, peft_model):
    peft_model(make_checkpoint(), target_modules=["q_proj", "embed_tokens"]).save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match=r"embed_tokens\.lora_embedding_A' has no place in a Llama's adapter"):
        open_adapter(tmp_path / "theirs")


def test_a_run_s_directory_is_pointed_to_its_adapter(make_checkpoint, tmp_path):
    save_adapter(
        loaded_model(make_checkpoint()), tmp_path / "run/adapter", "a/base", PromptFormat("llama2", None, []).texts()
    )
    with pytest.raises(UserError, match="has no adapter_config.json; name .*/run/adapter$"):
        open_adapter(tmp_path / "run")
    with pytest.raises(UserError, match="has no adapter_config.json; name the adapter/ of a run"):
        open_adapter(tmp_path)


def test_a_training_run_begins_from_an_adapter_of_peft(make_checkpoint, tmp_path, peft_model):
    """As the recipe does with init_adapter_from: held against the config first, copied after the base is loaded."""
    checkpoint = make_checkpoint()
    theirs = peft_model(checkpoint)
    theirs.save_pretrained(tmp_path / "theirs")
    lora = {"lora_attn_modules": ["q_proj", "k_proj"], "apply_lora_to_mlp": False, "lora_rank": 3, "lora_alpha": 9}
    model = loaded_model(checkpoint, **lora)
    copy_into_adapter(model, check_adapter_fits(model, open_adapter(tmp_path / "theirs")))
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=0)
    for change, words in [
        ({"lora_rank": 8}, "lora_rank is 3, the model's 8"),
        ({"lora_attn_modules": ["v_proj"]}, r"target_modules is \['k_proj', 'q_proj'\], the model's \['v_proj'\]"),
    ]:
        with pytest.raises(UserError, match=words):
            check_adapter_fits(loaded_model(checkpoint, **lora | change), open_adapter(tmp_path / "theirs"))


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_pattern_that_would_match_for_ever_is_refused_in_a_second(tmp_path, key):
    pattern = r"(.|..|...)+(?<!j)"
    value = {pattern: 2} if key == "rank_pattern" else pattern
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", key: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    config = read_peft_config(tmp_path)
    with pytest.raises(UserError, match="takes more than 0.5 s to match"):
        assert config.targets("model.layers.10.self_attn.q_proj")
        config.rank_of("model.layers.10.self_attn.q_proj")
