"""Checkpoints and adapters that read well and are wrong: refused by name, or said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from custom_components.export.merged_weights import BaseWeights
from custom_components.generation.decoding import generate
from custom_components.generation.sampling import Sampling
from custom_components.runtime.errors import UserError
from custom_components.weights.checkpoint_files import open_checkpoint
from tests.support.adapters import WEIGHTS, saved_adapter
from tests.support.models import loaded_model, with_random_adapters
from tests.support.recipe_runs import run_merge

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
UP_PROJECTION = "model.layers.1.mlp.up_proj.weight"


def changed(directory: Path, changes: dict[str, torch.Tensor]) -> Path:
    tensors = load_file(directory / "model.safetensors") | changes
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def weight(directory: Path, name: str) -> torch.Tensor:
    return load_file(directory / "model.safetensors")[name]


def refused(directory: Path, words: str, **lora: Any) -> None:
    """By loading for training or answers, and by reading for a merge."""
    with pytest.raises(UserError, match="checkpoint_dir: .*" + words):
        loaded_model(directory, **lora)
    with pytest.raises(UserError, match=words):
        base = BaseWeights(open_checkpoint(directory))
        for name in base.shapes:
            base.read(name)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [UP_PROJECTION, EMBEDDING, "model.norm.weight"])
@pytest.mark.parametrize("quantize_base", [False, True])
def test_values_that_are_not_finite_are_refused_by_the_name_of_their_tensor(
    make_checkpoint, name, value, quantize_base
):
    directory = make_checkpoint()
    broken = weight(directory, name).to(torch.bfloat16)
    broken.view(-1)[-7] = value
    changed(directory, {name: broken})
    refused(directory, f"{name} in .*model.safetensors holds values that are not finite", quantize_base=quantize_base)


def test_a_merge_of_such_a_checkpoint_names_the_tensor(make_checkpoint, tmp_path):
    directory = make_checkpoint()
    adapter = saved_adapter(with_random_adapters(loaded_model(directory)), tmp_path / "adapter")
    broken = weight(directory, UP_PROJECTION)
    broken[0, 0] = torch.nan
    changed(directory, {UP_PROJECTION: broken})
    code, _, err = run_merge(checkpoint_dir=directory, adapter_dir=adapter, output_dir=tmp_path / "merged")
    assert code == 2 and f"{UP_PROJECTION} in" in err and "the checkpoint is damaged" in err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_overflow_are_refused(make_checkpoint, temperature):
    """Weights that are finite in the checkpoint and not in the dtype they are computed in."""
    directory = make_checkpoint()
    changed(directory, {HEAD: weight(directory, HEAD) * 1e8})
    model = loaded_model(directory, torch.float16, lora_attn_modules=[], apply_lora_to_mlp=False)
    with pytest.raises(UserError, match="the logits are not finite"):
        sampling = Sampling(temperature=temperature)
        generate(model, [[1, 5, 7], [1, 9]], max_new_tokens=3, stop_tokens=[2], sampling=sampling)


@pytest.mark.parametrize("is_same", [True, False])
def test_a_tied_config_with_a_head_of_its_own_in_the_file(make_checkpoint, is_same):
    directory = make_checkpoint(tie_word_embeddings=True)
    embedding = weight(directory, EMBEDDING)
    head = embedding.clone()
    if not is_same:
        head[3, 5] += 1
    changed(directory, {HEAD: head})
    if is_same:
        loaded_model(directory)
    else:
        refused(directory, f"config.json says tie_word_embeddings, but {HEAD} in .* differs from {EMBEDDING}")


def test_a_model_beside_the_shards_of_another(make_checkpoint):
    directory = make_checkpoint()
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    names = load_file(directory / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded_model(directory)
    save_file(names, directory / "model.safetensors")
    refused(directory, "holds two models, model.safetensors and the shards of model.safetensors.index.json")


@pytest.mark.parametrize("has_index", [False, True])
def test_a_tensor_in_two_shards(make_checkpoint, has_index):
    directory = make_checkpoint()
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    save_file(tensors, directory / first)
    save_file({HEAD: tensors[HEAD] + 1}, directory / second)
    if has_index:
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, first) | {HEAD: second}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"{second}: holds '{HEAD}', which .*{first} holds too"):
        loaded_model(directory)


@pytest.fixture
def base_and_adapter(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint()
    return checkpoint, saved_adapter(with_random_adapters(loaded_model(checkpoint)), tmp_path / "adapter")


def test_an_adapter_that_changes_nothing_is_said(base_and_adapter, tmp_path):
    checkpoint, adapter = base_and_adapter
    tensors = load_file(adapter / WEIGHTS)
    save_file({name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}, adapter / WEIGHTS)
    code, _, err = run_merge(checkpoint_dir=checkpoint, adapter_dir=adapter, output_dir=tmp_path / "merged")
    assert code == 0 and f"warning: the adapter '{adapter}' changes nothing: every B is zero" in err


@pytest.mark.parametrize("file", [WEIGHTS, "adapter_model.bin"])
def test_an_adapter_without_tensors(base_and_adapter, tmp_path, file):
    checkpoint, adapter = base_and_adapter
    (adapter / WEIGHTS).unlink()
    if file == WEIGHTS:
        save_file({}, adapter / file)
    else:
        torch.save({}, adapter / file)
    code, _, err = run_merge(checkpoint_dir=checkpoint, adapter_dir=adapter, output_dir=tmp_path / "merged")
    assert code == 2 and f"{file}: holds no tensors" in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "has no r and no lora_alpha"),
        ("[]", "holds list, not a mapping"),
        ("null", "holds NoneType, not a mapping"),
        ('{"peft_type": "IA3"}', "only LoRA adapters can be loaded"),
        ('{"r": 4}', "has no lora_alpha"),
    ],
)
def test_a_config_that_is_not_an_adapters(base_and_adapter, tmp_path, text, words):
    checkpoint, adapter = base_and_adapter
    (adapter / "adapter_config.json").write_text(text)
    code, _, err = run_merge(checkpoint_dir=checkpoint, adapter_dir=adapter, output_dir=tmp_path / "merged")
    assert code == 2 and words in err
