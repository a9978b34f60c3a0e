"""L37, and of the laws of all training those that a preference run has more to keep for."""

import json
import math
import random
import re
import signal
import time

import pytest

from tests.support.checkpoints import write_checkpoint
from tests.support.forked_tune import ForkedTune
from tests.support.recipe_runs import arguments, preference_arguments, tune_run
from tests.support.rows import random_dialogs, write_dialogs, write_pairs
from tests.support.run_results import assert_equal, outcome, records

DPO = "lora_dpo_single_device"
LN_2 = pytest.approx(math.log(2), abs=1e-6)
# Dropout, packs, several epochs, validation, a partial last window: what an exact resume has to bring back.
RUN = [
    *("epochs=3", "lora_dropout=0.2", "packed=true", "max_seq_len=64", "batch_size=1", "gradient_accumulation_steps=2"),
    *("save_every_n_steps=2", "val_fraction=0.2", "run_val_every_n_steps=3", "max_steps=10"),
]
REFERENCE = "reference_log_probabilities.json"


def run(*arguments, **named):
    result = tune_run(*arguments, recipe=DPO, **named)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, dialogs and pairs, and the adapter of a fine-tuning run."""
    folder = tmp_path_factory.mktemp("preferences")
    write_checkpoint(folder / "base")
    write_dialogs(folder / "rows.jsonl", random_dialogs(20))
    write_pairs(folder / "pairs.jsonl", 24)
    fine_tuning = arguments(folder / "base", folder / "rows.jsonl", folder / "sft", "max_steps=4", "optimizer.lr=1e-2")
    fine_tuning += ["save_every_n_steps=2"]
    assert tune_run(*fine_tuning).returncode == 0
    return folder


def in_folder(folder, output_dir, *overrides):
    return preference_arguments(folder / "base", folder / "pairs.jsonl", output_dir, *overrides)


def num_records(output_dir):
    metrics = output_dir / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.mark.parametrize("num_kills", [2, pytest.param(15, marks=pytest.mark.slow)])
def test_L17_L37_killed_anywhere_and_begun_at_ln_2_packed_and_with_dropout(folder, tmp_path, num_kills):
    generator = random.Random(num_kills)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(*in_folder(folder, whole, *RUN))
    first, *_, last = [record for record in records(whole) if "loss" in record]
    assert first["loss"] == LN_2 and first["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert last["loss"] != LN_2 and last["step"] == 10
    again = [*in_folder(folder, killed, *RUN), "resume_from_checkpoint=auto"]
    for _ in range(num_kills):
        before = num_records(killed)
        process = ForkedTune("run", f"recipes/{DPO}.py", *again)
        while process.poll() is None and num_records(killed) <= before:
            time.sleep(0.001)
        time.sleep(generator.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.result()
    run(*again)
    assert_equal(outcome(whole), outcome(killed))
    assert (whole / REFERENCE).read_bytes() == (killed / REFERENCE).read_bytes()


def test_L37_after_fine_tuning_the_reference_is_the_adapter_at_its_start(folder, tmp_path):
    """The base would be the wrong reference: the fine-tuned adapter is far from it."""
    out = tmp_path / "out"
    from_sft = in_folder(
        folder, out, f"init_adapter_from={folder / 'sft/adapter'}", "packed=true", "max_seq_len=64", "max_steps=4"
    )
    validated = ["val_fraction=0.2", "save_every_n_steps=2"]
    said = run(*from_sft, *validated)
    assert re.search(r"reference: the adapter .*sft/adapter; log-probabilities of 24 pairs computed in", said)
    metrics = records(out)
    assert metrics[0]["loss"] == LN_2
    assert {"reward_margin", "reward_accuracy", "chosen_log_probability", "rejected_log_probability"} <= {*metrics[0]}
    assert {"val_loss", "val_reward_margin", "val_reward_accuracy"} <= {*metrics[-1]}
    assert "val_perplexity" not in metrics[-1]
    before, reference = outcome(out), (out / REFERENCE).read_bytes()

    # The same again reads it; a damaged one is computed anew; both end at the same bits, resumed or not.
    assert "log-probabilities of 24 pairs read from" in run(*from_sft, *validated, "overwrite_output_dir=true")
    assert (out / REFERENCE).read_bytes() == reference
    (out / REFERENCE).write_bytes(reference[:-40] + b"7" + reference[-39:])
    half = out / "checkpoints/step_000002"
    said = run(*from_sft, *validated, f"resume_from_checkpoint={half}")
    assert f"{REFERENCE} is damaged: the reference's log-probabilities are computed anew\n" in said
    assert (out / REFERENCE).read_bytes() == reference
    assert_equal(outcome(out), before)

    # A run that goes on keeps its reference.
    others = {
        "null": "init_adapter_from: was .*sft/adapter' when the run began, now None; it is the run's reference",
        str(
            folder / "sft/checkpoints/step_000002/adapter"
        ): "init_adapter_from: .* is the adapter that the run began from",
    }
    for other, words in others.items():
        again = [*from_sft, *validated, "resume_from_checkpoint=true", f"init_adapter_from={other}"]
        result = tune_run(*again, recipe=DPO)
        assert result.returncode == 2 and re.search(words, result.stderr), result.stderr
    card = (out / "adapter/README.md").read_text()
    assert "by direct preference optimization (DPO), from pairs" in card and "- dpo\n" in card
    assert "- loss: sigmoid\n- loss.beta: 0.1\n" in card and "Per pair." in card


def test_a_loss_without_a_reference_rates_nothing(folder, tmp_path):
    simpo = ["loss._component_=custom_components.training.preference_losses.simpo", "loss.beta=2.0", "max_steps=2"]
    assert "reference:" not in run(*in_folder(folder, tmp_path / "out", *simpo))
    assert not (tmp_path / "out" / REFERENCE).exists()
    assert records(tmp_path / "out")[0]["loss"] > 0


def test_L33_a_file_of_others_in_the_place_of_the_reference_is_not_replaced(folder, tmp_path):
    out = tmp_path / "out"
    run(*in_folder(folder, out, "max_steps=1"))
    (out / REFERENCE).write_text(json.dumps({"notes": "mine"}))
    result = tune_run(*in_folder(folder, out, "max_steps=1", "overwrite_output_dir=true"), recipe=DPO)
    assert result.returncode == 2 and f"{REFERENCE}' is not, as it is, what a run" in result.stderr
    assert json.loads((out / REFERENCE).read_text()) == {"notes": "mine"}
