"""Adapters in PEFT's format, and models, as they are saved. L20, L21."""

from pathlib import Path

import pytest
import torch

from custom_components.models.shapes import LLAMA2_7B
from custom_components.runs.model_weights import check_model_was_trained
from custom_components.runtime.errors import UserError
from custom_components.transforms.prompt_format import read_prompt_format
from custom_components.weights.adapters import check_adapter_was_trained
from custom_components.weights.checkpoint_files import BaseCheckpoint, open_checkpoint
from tests.support.adapters import PROMPT_FORMAT, saved_adapter, saved_model
from tests.support.checkpoints import write_checkpoint
from tests.support.models import (
    ALL_ATTENTION,
    TOKENS,
    dequantized_in_hugging_face_order,
    inference_model,
    loaded_model,
    whole_model,
    with_random_adapters,
)


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
    reloaded = inference_model(checkpoint, adapter)
    parameters = dict(reloaded.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, parameters[name]), name
    assert torch.equal(model(TOKENS), reloaded(TOKENS))
    assert read_prompt_format(adapter) == PROMPT_FORMAT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_L20_a_saved_model_is_the_one_in_memory(make_checkpoint, tmp_path, dtype):
    checkpoint = make_checkpoint()
    model = whole_model(checkpoint, dtype=dtype)
    with pytest.raises(UserError, match="no weight has changed, nothing was learned"):
        check_model_was_trained(model, open_checkpoint(checkpoint))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    check_model_was_trained(model, open_checkpoint(checkpoint))
    saved = saved_model(model, checkpoint, tmp_path / "model")
    parameters = dict(whole_model(saved, dtype=dtype).named_parameters())
    for name, parameter in model.named_parameters():
        assert parameters[name].dtype == parameter.dtype and torch.equal(parameter, parameters[name]), name
    assert read_prompt_format(saved) == PROMPT_FORMAT
    model.norm.scale.data[0] = float("nan")
    with pytest.raises(UserError, match=r"norm\.scale is not finite"):
        check_model_was_trained(model, open_checkpoint(checkpoint))


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


def test_the_base_is_named_as_it_was_downloaded(tmp_path):
    assert BaseCheckpoint(tmp_path, LLAMA2_7B).name == str(tmp_path)
    (tmp_path / "original_repo_id.json").write_text('{"repo_id": "meta-llama/Llama-2-7b-hf"}')
    assert BaseCheckpoint(tmp_path, LLAMA2_7B).name == "meta-llama/Llama-2-7b-hf"


@pytest.mark.parametrize("directory", ["base", "../work/base", "link"])
def test_peft_and_transformers_find_a_base_without_a_name_from_anywhere(tmp_path, monkeypatch, peft, directory):
    """AutoPeftModel and transformers take a relative directory that is not there for a name on the hub."""
    transformers = pytest.importorskip("transformers")
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    for path in (work, elsewhere):
        path.mkdir()
    monkeypatch.chdir(work)
    (work / "link").symlink_to(write_checkpoint(work / "base"))
    model = with_random_adapters(loaded_model(Path(directory))).eval()
    adapter = saved_adapter(model, tmp_path / "adapter", base_model=open_checkpoint(Path(directory)).name)
    monkeypatch.chdir(elsewhere)
    for theirs in (peft.AutoPeftModelForCausalLM, transformers.AutoModelForCausalLM):
        with torch.no_grad():
            logits = theirs.from_pretrained(adapter, dtype=torch.float32)(TOKENS).logits
            torch.testing.assert_close(model(TOKENS), logits, atol=1e-4, rtol=0)


def test_the_base_is_named_as_the_hub_does_where_that_is_known(tmp_path, monkeypatch):
    cached = tmp_path / "models--meta-llama--Llama-2-7b-hf" / "snapshots" / "01c7f73d"
    cached.mkdir(parents=True)
    assert BaseCheckpoint(cached, LLAMA2_7B).name == "meta-llama/Llama-2-7b-hf"
    (tmp_path / "link").symlink_to(cached)
    assert BaseCheckpoint(tmp_path / "link", LLAMA2_7B).name == "meta-llama/Llama-2-7b-hf"
    config = {"_name_or_path": "meta-llama/Llama-2-7b-hf"}
    monkeypatch.chdir(write_checkpoint(tmp_path / "Llama-2-7b-hf", **config).parent)
    assert open_checkpoint(Path("Llama-2-7b-hf")).name == "meta-llama/Llama-2-7b-hf"
    # What was trained further names its parent there.
    unknown = str(Path("my-model").resolve())
    assert open_checkpoint(write_checkpoint(Path("my-model"), **config)).name == unknown
    Path("my-model/README.md").write_text("---\nbase_model: meta-llama/Llama-2-7b-hf\n---\n")
    assert open_checkpoint(Path("my-model")).name == unknown
    # The card of a model that was pretrained names no parent.
    Path("my-model/README.md").write_text("---\nlicense: llama2\n---\n")
    assert open_checkpoint(Path("my-model")).name == "meta-llama/Llama-2-7b-hf"


@pytest.mark.parametrize(
    "url", ["https://huggingface.co/a/b", "https://user:token@huggingface.co/a/b.git", "git@hf.co:a/b"]
)
def test_the_base_is_named_as_the_repository_that_it_is_a_clone_of(tmp_path, url):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/config").write_text(
        f'[core]\n\tbare = false\n[remote "origin"]\n\turl = {url}\n\tfetch = +refs\n'
    )
    assert BaseCheckpoint(tmp_path, LLAMA2_7B).name == "a/b"
    (tmp_path / ".git/config").write_text('[remote "origin"]\n\turl = https://github.com/a/b\n')
    assert BaseCheckpoint(tmp_path, LLAMA2_7B).name == str(tmp_path)
