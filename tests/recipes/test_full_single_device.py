"""recipes/full_single_device.py: what it leaves, and what it refuses."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from custom_components.config.full_settings import FullSettings
from custom_components.config.reading import load_settings
from custom_components.runs.recognition import RESULTS
from custom_components.runtime.errors import UserError
from custom_components.transforms.prompt_format import read_prompt_format
from custom_components.weights.card import stated_steps
from tests.support.checkpoints import write_checkpoint
from tests.support.models import inference_model
from tests.support.paths import PROJECT, snapshot
from tests.support.recipe_runs import full_arguments, run_here, run_merge
from tests.support.rows import random_dialogs, write_dialogs
from tests.support.run_results import records

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_checkpoint(folder / "base")
    write_dialogs(folder / "rows.jsonl", random_dialogs(20))
    return folder


def run(inputs, output_dir, *overrides):
    rows = inputs / "rows.jsonl"
    return run_here("full_single_device", *full_arguments(inputs / "base", rows, output_dir, "max_steps=4", *overrides))


@pytest.fixture(scope="module")
def finished(inputs):
    """A run that validates once, at its end."""
    code, out, err = run(inputs, inputs / "out", "val_fraction=0.2", "seed=3")
    assert code == 0, err
    assert "warning" not in out + err
    return inputs / "out"


def test_the_result_is_a_hard_link_to_the_weights_of_its_step(finished):
    step = finished / "checkpoints/step_000004/model"
    assert (step / WEIGHTS).stat().st_ino == (finished / "model" / WEIGHTS).stat().st_ino
    assert (step / "config.json").stat().st_ino != (finished / "model/config.json").stat().st_ino
    assert torch.load(finished / "checkpoints/step_000004/state.pt")["best_adapter"] == {}
    assert stated_steps(finished / "model").num_steps == 4
    assert read_prompt_format(finished / "model").prompt_template == "llama2"
    assert RESULTS["model"].first_foreign(finished / "model") is None


def test_L23_the_result_loads_in_transformers_and_has_learned(finished, inputs):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(finished / "model", dtype="auto").eval()
    tokens = torch.arange(5, 40).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(
            inference_model(finished / "model")(tokens), theirs(tokens).logits, atol=1e-4, rtol=0
        )
    losses = [record["loss"] for record in records(finished) if "loss" in record]
    assert losses[-1] < losses[0]


def test_generate_evaluate_and_gguf_take_the_result(finished, inputs, tmp_path):
    model = f"checkpoint_dir={finished / 'model'}"
    code, out, err = run_here(
        "generate",
        "--config",
        str(PROJECT / "configs/generate.yaml"),
        model,
        "prompt=Who?",
        "max_new_tokens=3",
        "device=cpu",
    )
    assert code == 0 and out.strip(), err
    rows = f"dataset.source={inputs / 'rows.jsonl'}"
    evaluate = ["--config", str(PROJECT / "configs/evaluate.yaml"), model, rows, "cache_dir=null", "device=cpu"]
    code, out, err = run_here("evaluate", *evaluate)
    assert code == 0 and "perplexity" in out, err
    pytest.importorskip("gguf")
    output_dir = tmp_path / "gguf"
    code, out, err = run_merge(
        checkpoint_dir=finished / "model", adapter_dir="null", format="gguf", output_dir=output_dir
    )
    assert code == 0 and "written against the original weights" in out and "training rows" in out, err
    assert {path.name for path in output_dir.iterdir()} >= {"gguf-f16.gguf", "Modelfile", "README.md"}


def test_L12_what_is_not_trained_keeps_its_bytes(inputs, tmp_path):
    code, out, err = run(inputs, tmp_path / "out", "train_only=[layers.1, lm_head]")
    assert code == 0 and "trained parameters, of " in out, err
    before, after = load_file(inputs / "base" / WEIGHTS), load_file(tmp_path / "out/model" / WEIGHTS)
    assert before.keys() == after.keys()
    for name in before:
        is_trained = name.startswith("model.layers.1.") or name == "lm_head.weight"
        assert torch.equal(before[name], after[name]) != is_trained, name


def test_L18_the_best_is_kept_as_a_checkpoint_and_is_the_result(inputs, tmp_path):
    """A rate that destroys what was learned makes the first validation the best."""
    destroying = ("learning_rate=3.0", "clip_grad_norm=null", "warmup_ratio=0", "val_fraction=0.2")
    code, out, err = run(inputs, tmp_path / "out", *destroying, "run_val_every_n_steps=1", "save_every_n_steps=1")
    assert code == 0, err
    validations = [record["val_loss"] for record in records(tmp_path / "out") if "val_loss" in record]
    best = 1 + validations.index(min(validations))
    assert best < 4
    checkpoints = sorted(path.name for path in (tmp_path / "out/checkpoints").iterdir())
    assert checkpoints == [f"step_{best:06}", "step_000004"]
    kept = tmp_path / f"out/checkpoints/step_{best:06}/model" / WEIGHTS
    assert (tmp_path / "out/model" / WEIGHTS).samefile(kept)

    shutil.rmtree(kept.parents[1])
    code, out, err = run(
        inputs, tmp_path / "out", *destroying, "resume_from_checkpoint=true", "epochs=9", "max_steps=5"
    )
    assert code == 0 and f"the best validation, step {best}, is not here" in out, err


def test_L33_only_a_model_of_a_run_is_replaced(finished, inputs, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "model/notes.txt").write_text("mine")
    before = snapshot(out)
    code, _, err = run(inputs, out, "overwrite_output_dir=true")
    assert code == 2 and "notes.txt' is not, as it is, what a run of this project wrote" in err
    assert snapshot(out) == before
    (out / "model/notes.txt").unlink()
    (out / "mine.txt").write_text("mine")
    code, _, err = run(inputs, out, "overwrite_output_dir=true", "max_steps=2")
    assert code == 0, err
    assert (out / "mine.txt").exists()
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_000002"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["gradient_accumulation_steps=2"], "set gradient_accumulation_steps=1"),
        (["clip_grad_norm=1.0"], "set clip_grad_norm=null"),
        (["dtype=fp16"], "set dtype=bf16 or fp32"),
    ],
)
def test_what_excludes_a_step_in_the_backward_is_refused_by_name(overrides, words):
    config = ["--config", str(PROJECT / "configs/tiny_full.yaml"), "optimizer_in_backward=true", "clip_grad_norm=null"]
    load_settings(FullSettings, config)
    with pytest.raises(UserError) as error:
        load_settings(FullSettings, [*config, *overrides])
    assert str(error.value).startswith("optimizer_in_backward: true: ") and words in str(error.value)


def test_plain_adamw_on_bf16_weights_is_warned_of(inputs, tmp_path):
    code, out, err = run(
        inputs, tmp_path / "out", "dtype=bf16", "max_steps=1", "optimizer_in_backward=true", "clip_grad_norm=null"
    )
    assert code == 0, err
    assert "warning: torch.optim.AdamW rounds bf16 weights to the nearest" in out
    config = json.loads((tmp_path / "out/model/config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert load_file(tmp_path / "out/model" / WEIGHTS)["lm_head.weight"].dtype == torch.bfloat16
