"""recipes/lora_dpo_single_device.py: what it leaves, what other recipes and PEFT make of it, and what it refuses."""

import math

import pytest
import torch

from custom_components.datasets.preference import preference_dataset
from custom_components.datasets.tokenized_rows import split_validation
from custom_components.runs.recognition import RESULTS
from custom_components.training.preference import MEASURES
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.transforms.prompt_format import read_prompt_format
from custom_components.weights.card import stated_steps
from tests.support.checkpoints import write_checkpoint
from tests.support.paths import PROJECT
from tests.support.recipe_runs import preference_arguments, run_here, run_merge
from tests.support.rows import write_dialogs, write_pairs
from tests.support.run_results import records

VAL_FRACTION, SEED, BETA = 0.25, 3, 0.1


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_checkpoint(folder / "base")
    write_pairs(folder / "pairs.jsonl", 20)
    return folder


def arguments(inputs, output_dir, *overrides):
    return preference_arguments(inputs / "base", inputs / "pairs.jsonl", output_dir, *overrides)


@pytest.fixture(scope="module")
def finished(inputs):
    """A run that validates once, at its end."""
    overrides = ["max_steps=4", f"val_fraction={VAL_FRACTION}", f"seed={SEED}", "quantize_base=false"]
    code, out, err = run_here(
        "lora_dpo_single_device", *arguments(inputs, inputs / "out", "learning_rate=1e-2", *overrides)
    )
    assert code == 0, err
    assert "warning" not in out + err
    return inputs / "out"


def test_a_run_writes_its_measures_and_its_reference(finished):
    metrics = records(finished)
    steps, [validation] = metrics[:-1], metrics[-1:]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert all(set(MEASURES) <= record.keys() for record in steps)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and steps[0]["reward_accuracy"] == 0
    assert {"val_loss", *(f"val_{measure}" for measure in MEASURES)} <= validation.keys()
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in finished.iterdir() if not path.name.startswith(".")} == {
        *("adapter", "checkpoints", "config.yaml", "loss.png", "metrics.jsonl", "reference_log_probabilities.json")
    }
    assert stated_steps(finished / "adapter").num_steps == 4
    assert read_prompt_format(finished / "adapter").prompt_template == "llama2"
    assert RESULTS["adapter"].first_foreign(finished / "adapter") is None


def log_probability(model, row):
    """Of the supervised tokens, by transformers' whole logits."""
    log_probabilities = model(torch.tensor([row["tokens"]])).logits[0, :-1].log_softmax(-1)
    labels = torch.tensor(row["labels"][1:])
    is_supervised = labels >= 0
    return log_probabilities[is_supervised].gather(1, labels[is_supervised].unsqueeze(1)).sum().item()


def test_L21_peft_computes_the_measures_of_the_validation(finished, inputs, peft):
    """The adapter on transformers' model, switched off for the reference, on the pairs that were kept."""
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(inputs / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, finished / "adapter").eval()
    pairs = preference_dataset(
        Llama2ChatTransform(inputs / "base/tokenizer.model"), str(inputs / "pairs.jsonl"), cache_dir=None
    )
    _, held_out = split_validation(pairs, VAL_FRACTION, SEED)
    with torch.no_grad():
        rated = [[log_probability(model, pair[name]) for name in ("chosen", "rejected")] for pair in held_out]
        with model.disable_adapter():
            reference = [[log_probability(model, pair[name]) for name in ("chosen", "rejected")] for pair in held_out]
    rewards = BETA * (torch.tensor(rated) - torch.tensor(reference))
    margins = rewards[:, 0] - rewards[:, 1]
    expected = {
        "val_loss": torch.nn.functional.softplus(-margins).mean().item(),
        "val_reward_margin": margins.mean().item(),
        "val_reward_accuracy": (margins > 0).float().mean().item(),
        "val_chosen_log_probability": torch.tensor(rated)[:, 0].mean().item(),
        "val_rejected_log_probability": torch.tensor(rated)[:, 1].mean().item(),
    }
    validation = records(finished)[-1]
    assert {name: validation[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert abs(expected["val_reward_margin"]) > 0.01


def test_preview_estimate_generate_and_merge_take_it(finished, inputs, tmp_path):
    config = ["--config", str(finished / "config.yaml"), "overwrite_output_dir=true"]
    code, out, err = run_here("preview", *config, "num_rows=1")
    assert code == 0 and "chosen" in out and "rejected" in out, err
    code, out, err = run_here("estimate", *config)
    assert code == 0 and " trained" in out, err
    adapter = [f"checkpoint_dir={inputs / 'base'}", f"adapter_dir={finished / 'adapter'}"]
    generate = ["--config", str(PROJECT / "configs/generate.yaml"), *adapter, "prompt=Who?", "max_new_tokens=3"]
    code, out, err = run_here("generate", *generate, "device=cpu")
    assert code == 0 and out.strip(), err
    code, out, err = run_merge(
        checkpoint_dir=inputs / "base", adapter_dir=finished / "adapter", output_dir=tmp_path / "merged"
    )
    assert code == 0 and "training rows" in out, err


def test_evaluate_takes_dialogs_and_refuses_the_pairs_that_the_run_kept(finished, inputs, tmp_path):
    rows = {"dialogs": tmp_path / "dialogs.jsonl", "pairs": inputs / "pairs.jsonl"}
    write_dialogs(rows["dialogs"], [("Who?", "Nobody.")])
    adapter = [f"checkpoint_dir={inputs / 'base'}", f"adapter_dir={finished / 'adapter'}", "device=cpu"]
    evaluate = ["--config", str(PROJECT / "configs/evaluate.yaml"), *adapter, "cache_dir=null"]
    code, out, err = run_here("evaluate", *evaluate, f"dataset.source={rows['dialogs']}")
    assert code == 0 and "perplexity" in out and "tuned" in out, err
    draw = (f"val_fraction={VAL_FRACTION}", f"seed={SEED}")
    code, _, err = run_here("evaluate", *evaluate, f"dataset.source={rows['pairs']}", *draw)
    assert code == 2 and err.startswith("error: val_fraction: 0.25: this adapter learned from pairs of answers")
    assert "metrics.jsonl: val_loss, val_reward_margin" in err and len(err.splitlines()) == 1
    code, _, err = run_here("evaluate", *evaluate, f"dataset.source={rows['pairs']}")
    assert code == 2 and "recipes/lora_dpo_single_device.py" in err, err


def test_rows_that_are_no_pairs_are_refused(inputs, tmp_path):
    dialogs = write_dialogs(tmp_path / "dialogs.jsonl", [("Who?", "Nobody.")])
    out = tmp_path / "out"
    code, _, err = run_here("lora_dpo_single_device", *preference_arguments(inputs / "base", dialogs, out))
    assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1
    assert not out.exists()


def test_a_dropout_that_the_reference_is_without_is_said(finished, inputs, tmp_path):
    begun = [f"init_adapter_from={finished / 'adapter'}", "lora_dropout=0.1", "max_steps=1", "quantize_base=false"]
    code, out, err = run_here("lora_dpo_single_device", *arguments(inputs, tmp_path / "out", *begun))
    assert code == 0 and "lora_dropout 0.1: the reference, the adapter in init_adapter_from, is without" in out + err
