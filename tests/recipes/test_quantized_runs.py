"""A base in another format than NF4, in every recipe that loads one."""

import json
import re

import pytest

from tests.support.recipe_runs import arguments, run_here, run_merge, tune_run
from tests.support.rows import random_dialogs, write_dialogs
from tests.support.run_results import assert_equal, outcome


def done(recipe, *overrides):
    code, out, err = run_here(recipe, *overrides)
    assert code == 0, err
    return out


@pytest.mark.parametrize("format", ["int8", pytest.param("nf4_single", marks=pytest.mark.slow)])
def test_a_run_over_a_base_in_another_format_resumes_answers_and_merges(make_checkpoint, tmp_path, format):
    checkpoint, rows = make_checkpoint(), write_dialogs(tmp_path / "rows.jsonl", random_dialogs(8))
    choices = ("quantize_base=false", f"quantization={format}", "max_steps=3", "save_every_n_steps=2", "lora_rank=4")
    # The second run starts from what the first has kept.
    kept = ("quantized_cache=true", f"cache_dir={tmp_path / 'cache'}")
    outputs = [tmp_path / "whole", tmp_path / "resumed"]
    whole, resumed = [arguments(checkpoint, rows, output, "dtype=fp32", *choices, *kept) for output in outputs]
    result = tune_run(*whole)
    assert result.returncode == 0, result.stderr
    assert ("8-bit integers" if format == "int8" else "without double quantization") in result.stdout
    done("lora_single_device", *resumed, "max_steps=2")
    done("lora_single_device", *resumed, "resume_from_checkpoint=true")
    assert_equal(*map(outcome, outputs))
    refused = tune_run(*resumed, "resume_from_checkpoint=true", "quantization=none")
    assert refused.returncode == 2 and f"quantization was '{format}', now 'none'" in refused.stderr

    told = [f"checkpoint_dir={checkpoint}", f"adapter_dir={outputs[0]}/adapter", "device=cpu", f"quantization={format}"]
    scores = tmp_path / "scores.json"
    evaluating = ["--config", "configs/evaluate.yaml", *told, f"dataset.source={rows}", f"output_file={scores}"]
    done("evaluate", *evaluating, "cache_dir=null", "dtype=fp32")
    assert json.loads(scores.read_text())["quantization"] == format
    assert done("generate", "--config", "configs/generate.yaml", *told, "prompt=Where to?", "max_new_tokens=4")
    merge = {"checkpoint_dir": checkpoint, "adapter_dir": outputs[0] / "adapter", "output_dir": tmp_path / "merged"}
    for base in ("dequantized", "original"):
        code, out, err = run_merge(**merge, base=base, overwrite_output_dir="true")
        assert code == 0, err
        assert f"merged against the {base} weights + adapter" in out
    assert re.search(f"merged against the {'int8' if format == 'int8' else 'NF4'} weights \\+ adapter, as trained", out)


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("lora_single_device", ["quantization=int8", "quantize_base=true"], "int8 beside quantize_base true"),
        ("lora_single_device", ["quantization=int4"], "quantization: 'int4' should be 'nf4', 'nf4_single'"),
        (
            "lora_single_device",
            ["quantization=int8", "~model.quantization", "quantize_base=false"],
            "not reach the mod",
        ),
        ("evaluate", ["quantization=none", "quantize_base=true"], "none beside quantize_base true"),
        ("generate", ["quantization=int8", "fold_adapter=true", "adapter_dir=x"], "true beside quantization int8"),
        ("full_single_device", ["quantization=int8"], "quantization: unknown key"),
    ],
)
def test_what_a_format_cannot_be_beside_is_refused(recipe, overrides, message):
    configs = {"evaluate": "evaluate", "generate": "generate", "full_single_device": "tiny_full"}
    config = configs.get(recipe, "tiny_qlora")
    code, _, err = run_here(recipe, "--config", f"configs/{config}.yaml", *overrides)
    assert code == 2 and message in err
