"""PiSSA begins as the base with A and B at the weight's principal part, and is a LoRA of twice the rank on disk."""

import re

import pytest
import torch

from custom_components.models import quantization
from custom_components.models.llama import lora_llama
from custom_components.models.lora import adapter_modules
from custom_components.models.pissa import PiSSALinear
from custom_components.models.shapes import LLAMA2_7B
from custom_components.runtime.errors import UserError
from custom_components.weights.adapter_files import open_adapter
from custom_components.weights.adapters import check_adapter_was_trained, load_adapter, save_adapter
from custom_components.weights.trained_counts import num_adapter_parameters
from tests.support.models import TOKENS, dequantized_in_hugging_face_order, inference_model, loaded_model
from tests.support.recipe_runs import arguments, run_here, run_merge, tune_run
from tests.support.rows import random_dialogs, write_dialogs
from tests.support.run_results import assert_equal, outcome

PISSA = {"init_lora_weights": "pissa", "lora_alpha": 7.0}


def trained(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)
    return model.eval()


@pytest.mark.parametrize("choices", [{}, {"quantize_base": True}, {"use_rslora": True, "apply_lora_to_output": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pissa_begins_as_the_base_exactly_and_every_matrix_learns(make_checkpoint, choices, dtype):
    checkpoint = make_checkpoint()
    plain = {key: value for key, value in choices.items() if key == "quantize_base"}
    base = loaded_model(checkpoint, dtype, lora_attn_modules=[], apply_lora_to_mlp=False, **plain)
    model = loaded_model(checkpoint, dtype, lora_dropout=0.3, **PISSA, **choices)
    output = model(TOKENS)
    if "use_rslora" not in choices:  # the head's product is written into another tensor
        assert torch.equal(output, base(TOKENS))
    torch.testing.assert_close(output, base(TOKENS))
    output.float().square().mean().backward()
    for module in adapter_modules(model).values():
        assert module.lora_a.weight.grad.any() and module.lora_b.weight.grad.any()


def test_the_start_is_the_weight_s_best_approximation(make_checkpoint):
    model = loaded_model(make_checkpoint(), quantize_base=True, **PISSA)
    for name, module in adapter_modules(model).items():
        assert isinstance(module, PiSSALinear)
        weight = module.weight
        if quantization.is_quantized(weight):
            weight = quantization.dequantize(weight, torch.float32)
        left = weight - module.scaling * module.lora_b.weight @ module.lora_a.weight
        best = torch.linalg.svdvals(weight)[module.rank :].norm()
        assert best <= left.norm() * (1 + 1e-5) and left.norm() <= best * 1.01, name


def test_settings_at_odds_are_refused():
    for choices in ({"init_lora_weights": "pissa", "use_dora": True}, {"init_lora_weights": "olora"}):
        with pytest.raises(ValueError, match="init_lora_weights: '"), torch.device("meta"):
            lora_llama(LLAMA2_7B, ["q_proj"], **choices)
    for key in ("use_dora=true", "init_adapter_from=x"):
        told = ("--config", "configs/tiny_qlora.yaml", "init_lora_weights=pissa", key)
        code, _, err = run_here("lora_single_device", *told)
        assert code == 2 and "init_lora_weights: pissa beside" in err


def test_a_start_that_nothing_changed_is_not_a_result(make_checkpoint):
    model = loaded_model(make_checkpoint(), **PISSA)
    with pytest.raises(UserError, match="what PiSSA began with, so nothing was learned"):
        check_adapter_was_trained(model)
    check_adapter_was_trained(trained(model))


@pytest.mark.parametrize("choices", [{}, {"quantize_base": True}, {"use_rslora": True}])
def test_L20_L21_on_disk_it_is_peft_s_lora_of_twice_the_rank(make_checkpoint, tmp_path, peft, choices):
    transformers = pytest.importorskip("transformers")
    checkpoint = make_checkpoint()
    model = trained(loaded_model(checkpoint, **PISSA, **choices))
    save_adapter(model, tmp_path / "adapter", "base", {})
    expected = model(TOKENS)
    again = loaded_model(checkpoint, seed=5, **PISSA, **choices).eval()
    load_adapter(again, open_adapter(tmp_path / "adapter"))
    assert torch.equal(again(TOKENS), expected)
    loaded = inference_model(checkpoint, tmp_path / "adapter", choices.get("quantize_base", False))
    torch.testing.assert_close(loaded(TOKENS), expected, atol=1e-4, rtol=1e-4)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if "quantize_base" in choices:
        for name, parameter in theirs.named_parameters():
            if "proj" in name:
                parameter.data = dequantized_in_hugging_face_order(model, name)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert theirs.peft_config["default"].r == 8
    torch.testing.assert_close(theirs(TOKENS).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_run_resumes_exactly_and_merges_with_a_proof(make_checkpoint, tmp_path):
    checkpoint, rows = make_checkpoint(), write_dialogs(tmp_path / "rows.jsonl", random_dialogs(8))
    choices = (
        "init_lora_weights=pissa",
        "max_steps=3",
        "save_every_n_steps=2",
        "lora_rank=4",
        "sample_prompts=[Where]",
    )
    outputs = [tmp_path / "whole", tmp_path / "resumed"]
    whole, resumed = [arguments(checkpoint, rows, output, "dtype=fp32", *choices) for output in outputs]
    result = tune_run(*whole)
    assert result.returncode == 0, result.stderr
    for told in (["max_steps=2"], ["resume_from_checkpoint=true"]):
        code, _, err = run_here("lora_single_device", *resumed, *told)
        assert code == 0, err
    assert_equal(*map(outcome, outputs))
    trained_count = int(re.search(r"([\d,]+) trained parameters in fp32", result.stdout)[1].replace(",", ""))
    assert num_adapter_parameters(outputs[0] / "adapter", "pissa") == trained_count
    card = (outputs[0] / "adapter/README.md").read_text()
    assert "lora_rank: 8" in card and "twice the 4 that were trained" in card
    refused = tune_run(*resumed, "resume_from_checkpoint=true", "init_lora_weights=null")
    assert refused.returncode == 2 and "init_lora_weights was 'pissa', now None" in refused.stderr
    code, out, err = run_merge(
        checkpoint_dir=checkpoint, adapter_dir=outputs[0] / "adapter", output_dir=tmp_path / "merged"
    )
    assert code == 0 and "merged against the original weights + adapter" in out, err
