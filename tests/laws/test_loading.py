"""What is loaded: all of it or an error (L24), and an adapter with its prompt format (L25)."""

import json
import runpy
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor

from custom_components.models.builders import llama_from_config, lora_llama_from_config
from custom_components.runtime.errors import UserError
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.transforms.prompt_format import PromptFormat, read_prompt_format
from custom_components.weights.adapter_files import open_adapter
from custom_components.weights.adapters import load_adapter
from custom_components.weights.checkpoint_files import open_checkpoint
from custom_components.weights.checkpoint_loading import load_base_weights
from tests.support.adapters import WEIGHTS, saved_adapter, saved_model
from tests.support.models import CPU, inference_model, loaded_model, whole_model, with_random_adapters
from tests.support.paths import PROJECT, TINY_TOKENIZER
from tests.support.recipe_runs import run_merge


def rewritten(file, change):
    """The safetensors file with `change` made to its tensors."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("model_of", [loaded_model, whole_model])
def test_L24_a_checkpoint_that_does_not_fit_is_named_tensor_by_tensor(make_checkpoint, model_of):
    checkpoint = make_checkpoint()

    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 3)

    rewritten(checkpoint / "model.safetensors", change)
    with pytest.raises(UserError) as error:
        model_of(checkpoint)
    message = str(error.value)
    assert "norm.scale is missing" in message
    assert "model.layers.1.mlp.up_proj.weight has shape (3, 3), the model (128, 64)" in message
    assert "model.layers.2.mlp.up_proj.weight is not of this model" in message


@pytest.mark.parametrize("model_of", [loaded_model, whole_model])
def test_L24_a_checkpoint_with_a_tensor_no_llama_has(make_checkpoint, model_of):
    checkpoint = make_checkpoint()
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    rewritten(checkpoint / "model.safetensors", lambda tensors: tensors.update(bias))
    with pytest.raises(UserError, match=r"q_proj\.bias"):
        model_of(checkpoint)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"rope_theta": 1e6}, "rope_base"),
        ({"num_attention_heads": 2}, "num_heads"),
    ],
)
@pytest.mark.parametrize("build", [partial(lora_llama_from_config, lora_attn_modules=["q_proj"]), llama_from_config])
def test_L24_another_model_with_the_same_tensor_shapes(make_checkpoint, changes, name, build):
    """CodeLlama's rotary base, say: every tensor fits, and the model would be wrong in silence."""
    built = make_checkpoint("built")
    with torch.device("meta"):
        model = build(built)
    with pytest.raises(UserError, match=name):
        load_base_weights(model, open_checkpoint(make_checkpoint("other", **changes)), torch.float32, CPU)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"lora_rank": 2}, "lora_rank is 4, the model's 2"),
        ({"lora_alpha": 3}, "lora_alpha is 16, the model's 3"),
        ({"use_rslora": True}, "use_rslora is False, the model's True"),
        ({"use_dora": True}, "use_dora is False, the model's True"),
        (
            {"apply_lora_to_mlp": False},
            r"target_modules is \['down_proj', .*\], the model's \['k_proj', 'o_proj', 'q_proj', 'v_proj'\]",
        ),
        ({"lora_attn_modules": [], "apply_lora_to_mlp": False}, "the model has no adapters"),
    ],
)
def test_L24_an_adapter_of_another_rank_scaling_or_targets(make_checkpoint, tmp_path, lora, words):
    checkpoint = make_checkpoint()
    adapter = saved_adapter(loaded_model(checkpoint), tmp_path / "adapter")
    with pytest.raises(UserError, match=words):
        load_adapter(loaded_model(checkpoint, **lora), open_adapter(adapter))


def test_L24_an_adapter_of_another_model(make_checkpoint, tmp_path):
    adapter = saved_adapter(loaded_model(make_checkpoint()), tmp_path / "adapter")
    wider = make_checkpoint("wider", hidden_size=128)
    with pytest.raises(UserError, match=r"lora_A\.weight has shape \(4, 64\), the model \(4, 128\)"):
        inference_model(wider, adapter)
    shallower = make_checkpoint("shallower", num_hidden_layers=1)
    with pytest.raises(UserError, match=r"model\.layers\.1\..*lora_A\.weight has no place in the model"):
        inference_model(shallower, adapter)
    deeper = make_checkpoint("deeper", num_hidden_layers=3)
    with pytest.raises(UserError, match=r"model\.layers\.2\.\S+ is one of its target_modules and has no tensor"):
        inference_model(deeper, adapter)


Q1 = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(f"{Q1}.lora_B.weight"), f"{Q1}.lora_B.weight is missing"),
        (
            lambda tensors: tensors.update({f"{Q1}.lora_B.weight": torch.zeros(3, 4)}),
            rf"{Q1}.lora_B.weight has shape \(3, 4\), the model \(64, 4\)",
        ),
        (
            lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(Q1)],
            f"{Q1.removeprefix('base_model.model.')} is one of its target_modules and has no tensor",
        ),
        (
            lambda tensors: tensors.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)}),
            "lm_head.lora_B.weight is missing",
        ),
        (
            lambda tensors: tensors.update({f"{Q1}.bias": torch.zeros(64)}),
            rf"'{Q1}.bias' has no place in a Llama's adapter",
        ),
        (
            lambda tensors: tensors.update({f"{Q1}.lora_B.default.weight": torch.zeros(64, 4)}),
            "are the same tensor",
        ),
    ],
)
def test_L24_an_adapter_s_file_with_a_tensor_too_few_too_many_or_misshapen(make_checkpoint, tmp_path, change, words):
    checkpoint = make_checkpoint()
    adapter = saved_adapter(loaded_model(checkpoint), tmp_path / "adapter")
    rewritten(adapter / WEIGHTS, change)
    with pytest.raises(UserError, match=words):
        inference_model(checkpoint, adapter)


def test_L24_an_adapter_s_config_that_is_not_its_file_s(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint()
    adapter = saved_adapter(loaded_model(checkpoint), tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"].remove("q_proj")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj is none of its target_modules and has a tensor"):
        inference_model(checkpoint, adapter)


def test_L24_a_dora_adapter_without_its_magnitudes(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint()
    adapter = saved_adapter(loaded_model(checkpoint, use_dora=True), tmp_path / "adapter")
    rewritten(adapter / WEIGHTS, lambda tensors: [tensors.pop(key) for key in list(tensors) if "magnitude" in key])
    with pytest.raises(UserError, match="lora_magnitude_vector is missing"):
        inference_model(checkpoint, adapter)


def test_L24_a_torn_adapter(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint()
    adapter = saved_adapter(loaded_model(checkpoint), tmp_path / "adapter")
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        open_adapter(adapter)
    (adapter / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"has no {WEIGHTS}"):
        open_adapter(adapter)


@pytest.fixture
def asked(monkeypatch):
    """A function that runs generate.py and returns the tokens that its model read, those of the prompt first."""
    recipe_main = runpy.run_path(str(PROJECT / "recipes/generate.py"))["recipe_main"]
    read = []
    forward = torch.nn.Embedding.forward

    def recorded_forward(module, tokens):
        read.append(tokens.flatten().tolist())
        return forward(module, tokens)

    monkeypatch.setattr(torch.nn.Embedding, "forward", recorded_forward)

    def ask(checkpoint, adapter, *overrides):
        read.clear()
        command = ["generate.py", "--config", str(PROJECT / "configs/generate.yaml"), f"checkpoint_dir={checkpoint}"]
        command += [
            f"adapter_dir={adapter or 'null'}",
            "prompt=Who is it?",
            "device=cpu",
            "dtype=fp32",
            "max_new_tokens=12",
        ]
        monkeypatch.setattr(sys, "argv", [*command, *overrides])
        recipe_main()
        return read[0], [token for tokens in read[1:] for token in tokens]

    return ask


def trained_prompt(**prompt_format):
    """The tokens that training shows for the question, before those of the answer."""
    dialog = [{"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": "Nobody."}]
    row = Llama2ChatTransform(TINY_TOKENIZER, **prompt_format)({"messages": dialog})
    return row["tokens"][: row["mask"].index(False)]


@pytest.mark.parametrize("is_whole", [False, True], ids=["adapter", "whole"])
@pytest.mark.parametrize("template", ["alpaca", {"user": "Q: {content}\n", "assistant": "A: {content}"}])
def test_L25_generation_asks_as_adapter_or_model_was_trained(
    make_checkpoint, tmp_path, asked, capsys, template, is_whole
):
    checkpoint = make_checkpoint()
    prompt_format = PromptFormat(template, "Be kind.", ["</s>"])
    if is_whole:
        trained = saved_model(whole_model(checkpoint), checkpoint, tmp_path / "model", prompt_format)
        prompt, _ = asked(trained, None)
    else:
        trained = saved_adapter(with_random_adapters(loaded_model(checkpoint)), tmp_path / "adapter", prompt_format)
        prompt, _ = asked(checkpoint, trained)
    assert read_prompt_format(trained) == prompt_format
    assert prompt == trained_prompt(prompt_template=template, system_prompt="Be kind.")
    assert prompt != trained_prompt()
    assert "warning" not in capsys.readouterr().err


def test_L25_a_merged_model_is_asked_as_its_adapter_was_trained(make_checkpoint, tmp_path, asked):
    checkpoint, merged = make_checkpoint(), tmp_path / "merged"
    prompt_format = PromptFormat("alpaca", "Be kind.", ["</s>"])
    adapter = saved_adapter(with_random_adapters(loaded_model(checkpoint)), tmp_path / "adapter", prompt_format)
    assert run_merge(checkpoint_dir=checkpoint, adapter_dir=adapter, output_dir=merged, prove="false")[0] == 0
    prompt, answer = asked(checkpoint, adapter)
    assert prompt == trained_prompt(prompt_template="alpaca", system_prompt="Be kind.")
    assert asked(merged, None) == (prompt, answer)


@pytest.mark.parametrize(
    "text",
    [
        "- llama2",
        "prompt_template: llama2",
        "prompt_template: 5\nsystem_prompt: null\nstop_tokens: []",
        "prompt_template: {user: 5}\nsystem_prompt: null\nstop_tokens: []",
        "prompt_template: llama2\nsystem_prompt: [a]\nstop_tokens: []",
        "prompt_template: llama2\nsystem_prompt: null\nstop_tokens: null",
        "prompt_template: llama2\nsystem_prompt: null\nstop_tokens: [2]",
        "prompt_template: llama2\nsystem_prompt: '\xff'\nstop_tokens: []",
        "prompt_template: [",
    ],
)
def test_L25_a_prompt_format_that_is_none_is_one_error_line(tmp_path, text):
    (tmp_path / "prompt_format.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="not a prompt format") as error:
        read_prompt_format(tmp_path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("key", "told"), [("prompt_template", "human_response"), ("system_prompt", "Be rude.")])
def test_L25_generation_warns_when_told_otherwise(make_checkpoint, tmp_path, asked, capsys, key, told):
    checkpoint = make_checkpoint()
    trained = {"prompt_template": "alpaca", "system_prompt": "Be kind."}
    model = with_random_adapters(loaded_model(checkpoint))
    adapter = saved_adapter(model, tmp_path / "adapter", PromptFormat(**trained, stop_tokens=[]))
    prompt, _ = asked(checkpoint, adapter, f"{key}={told}")
    assert prompt == trained_prompt(**trained | {key: told})
    warning = f"warning: {key} is {told!r}, it was trained with {trained[key]!r}"
    assert capsys.readouterr().err.splitlines().count(warning) == 1
    asked(checkpoint, adapter, f"{key}={trained[key]}")
    assert "warning" not in capsys.readouterr().err


def test_L25_an_answer_ends_at_the_adapter_s_stop_tokens(make_checkpoint, tmp_path, asked):
    checkpoint = make_checkpoint()
    model = loaded_model(checkpoint)
    _, answer = asked(checkpoint, saved_adapter(model, tmp_path / "adapter", PromptFormat("llama2", None, [])))
    stop = answer[5]
    assert len(answer) >= 11 and stop != 2
    piece = SentencePieceProcessor(model_file=str(TINY_TOKENIZER)).id_to_piece(stop)
    adapter = saved_adapter(model, tmp_path / "stopping", PromptFormat("llama2", None, ["</s>", piece]))
    _, stopped = asked(checkpoint, adapter)
    assert stopped == answer[: answer.index(stop)]
