"""The training recipe as a user runs it: `tune run` in a subprocess, on the embedded model or a smaller random one."""

import json
import math
import re

import pytest
import yaml

from tests.support.forked_tune import ForkedTune
from tests.support.paths import PROJECT
from tests.support.recipe_runs import arguments, started_tune, tune_run
from tests.support.run_results import assert_equal, outcome

DEMO_RUN = [
    *("run", "recipes/lora_single_device.py"),
    *("--config", "configs/tiny_qlora.yaml", "max_steps_per_epoch=3", "run_val_every_n_steps=2", "lora_rank=32"),
    *("sample_prompts=['Who?']", "dataset_val.max_rows=32", "cache_dir=null"),
]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A short run of the embedded model with the demo's own config, in a process of its own from the start."""
    output_dir = tmp_path_factory.mktemp("runs") / "with = in its name"
    return started_tune(*DEMO_RUN, f"output_dir={output_dir}", OMP_NUM_THREADS="2"), output_dir


def test_a_run_writes_what_it_says(finished_run):
    result, output_dir = finished_run
    assert result.returncode == 0, result.stderr
    assert "Skipping import" not in result.stdout + result.stderr
    records = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    metrics = [record for record in records if "loss" in record]
    validations = [record for record in records if "val_loss" in record]
    assert [record["step"] for record in validations] == [2, 3, 4, 6]
    assert all(record["val_perplexity"] == math.exp(record["val_loss"]) for record in validations)
    assert f"step {min(validations, key=lambda record: record['val_loss'])['step']}'s, the best by" in result.stdout
    assert [record["step"] for record in metrics] == list(range(1, 7))
    assert [record["epoch"] for record in metrics] == [0] * 3 + [1] * 3
    assert set(metrics[0]) == {
        *("step", "epoch", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "step_seconds"),
        *("tokens_per_second", "peak_memory_gib"),
    }
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert all(record["lr"] > 0 for record in metrics)
    assert (output_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (output_dir / "adapter").iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "prompt_format.yaml"),
    ]
    assert json.loads((output_dir / "adapter/adapter_config.json").read_text())["r"] == 32
    assert sorted(path.name for path in output_dir.iterdir() if not path.name.startswith(".")) == [
        *("adapter", "checkpoints", "config.yaml", "loss.png", "metrics.jsonl", "samples.jsonl"),
    ]
    for words in (
        "1200 rows, 1200 kept",
        "trained parameters in fp32 over a base in 4-bit NF4",
        "6 steps",
        "before  ",
        "after   ",
    ):
        assert words in result.stdout


def test_L16_a_forked_run_is_a_started_one(finished_run, tmp_path):
    """What nearly all tests take for granted: its files are those of `tune` itself byte for byte, and its words."""
    started, started_dir = finished_run
    forked_dir = tmp_path / "out"
    forked = ForkedTune(*DEMO_RUN, f"output_dir={forked_dir}", num_threads=2).result()
    assert forked.returncode == started.returncode == 0
    files = [path.relative_to(started_dir) for path in sorted(started_dir.rglob("*")) if path.is_file()]
    assert [path.relative_to(forked_dir) for path in sorted(forked_dir.rglob("*")) if path.is_file()] == files
    assert_equal(outcome(forked_dir), outcome(started_dir))
    for file in files:
        if file.name not in ("metrics.jsonl", "state.pt"):
            contents = [(folder / file).read_bytes() for folder in (forked_dir, started_dir)]
            assert contents[0].replace(bytes(forked_dir), b"") == contents[1].replace(bytes(started_dir), b""), file

    def without_measurements(words, folder):
        return re.sub(r"[\d.]+ (s|tokens/s|GiB)\b", r"... \1", words.replace(str(folder), "")).splitlines()

    assert without_measurements(forked.stdout, forked_dir) == without_measurements(started.stdout, started_dir)
    for run in (forked, started):
        assert all(re.match(r"step \d|loading: |$", line) for line in run.stderr.splitlines()), run.stderr


def test_the_written_config_runs_again(finished_run, tmp_path):
    _, output_dir = finished_run
    overrides = (f"output_dir={tmp_path / 'again'}", "sample_prompts=[]", "epochs=1", "max_steps_per_epoch=1")
    result = tune_run("--config", str(output_dir / "config.yaml"), *overrides)
    assert result.returncode == 0, result.stderr
    first = [
        json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
        for folder in (output_dir, tmp_path / "again")
    ]
    assert first[0]["loss"] == first[1]["loss"]


@pytest.mark.parametrize("system_prompt", ["Be kind.", ""])
def test_L25_the_adapter_states_the_system_prompt_of_its_rows(make_checkpoint, rows, tmp_path, system_prompt):
    config = yaml.safe_load((PROJECT / "configs/llama_qlora.yaml").read_text())
    config["tokenizer"]["system_prompt"] = "Be brief."
    config["dataset"]["system_prompt"] = system_prompt
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    overrides = arguments(make_checkpoint(), rows, tmp_path / "out", "epochs=1", "max_steps_per_epoch=1")[2:]
    result = tune_run("--config", str(tmp_path / "config.yaml"), *overrides)
    assert result.returncode == 0, result.stderr
    stated = yaml.safe_load((tmp_path / "out/adapter/prompt_format.yaml").read_text())
    assert stated["system_prompt"] == system_prompt


def test_generate_answers_with_and_without_the_adapter(finished_run):
    _, output_dir = finished_run
    common = ["--config", "configs/generate.yaml", "checkpoint_dir=examples/tiny_llama/checkpoint", "device=cpu"]
    result = tune_run(
        *common, f"adapter_dir={output_dir}/adapter", "prompt=Name: a = ${b}", "compare=true", recipe="generate"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("base   ") and "\ntuned  " in result.stdout
    assert tune_run(*common, "prompt=Who?", "temperature=1", "top_k=5", recipe="generate").returncode == 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["lora_rnak=32"], "lora_rnak: unknown key; did you mean 'lora_rank'? (override 'lora_rnak=32')"),
        (["checkpoint_dir=nowhere"], "'nowhere' is not a directory"),
        (["device=cuda:7"], "device: 'cuda:7' is not there"),
        (["output_dir=/proc/nothing"], "output_dir: '/proc/nothing' cannot be written"),
        (["dataset.source=no.jsonl"], "there is no file 'no.jsonl'"),
        (["tokenizer.path=README.md"], "is not a SentencePiece model"),
        (["model._component_=custom_components.models.lora_llama2_7b"], "has num_layers 2"),
        (["optimizer.lr=1e-46"], "every B of the adapter is still zero"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_2(make_checkpoint, rows, tmp_path, overrides, words):
    model_overrides = ["~model.checkpoint_dir"] if "lora_llama2_7b" in overrides[0] else []
    result = tune_run(*arguments(make_checkpoint(), rows, tmp_path / "out", *overrides, *model_overrides))
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0], result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out/adapter").exists()


def test_a_run_does_not_overwrite_another(make_checkpoint, rows, finished_run):
    """`make demo`, whose config says overwrite_output_dir: true, shows the other side."""
    _, output_dir = finished_run
    before = (output_dir / "metrics.jsonl").read_text()
    result = tune_run(*arguments(make_checkpoint(), rows, output_dir))
    assert result.returncode == 2
    assert "holds the results of a run" in result.stderr
    assert (output_dir / "metrics.jsonl").read_text() == before


def test_real_weights_and_conversations(test_data, tmp_path):
    """The command line of the README on a real checkpoint and a real data set."""
    checkpoint = test_data("stories260K/config.json").parent
    source = test_data("guanaco_llama2_1k/train.parquet")
    result = tune_run(
        *("--config", "configs/llama_qlora.yaml", f"checkpoint_dir={checkpoint}", f"dataset.source={source}"),
        *("device=cpu", "max_steps_per_epoch=2", "lora_rank=32", f"output_dir={tmp_path / 'out'}", "cache_dir=null"),
    )
    assert result.returncode == 0, result.stderr
    for words in ("1000 rows", "2 with an empty question", "1 empty answer within a dialog"):
        assert words in result.stdout
    assert json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())["r"] == 32
