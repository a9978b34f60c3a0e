"""The configs for whole projects: each runs as it is but for paths, device and sizes, and plans what it says."""

import json
import re

import pytest
import torch

from custom_components.config.components import instantiate
from custom_components.config.lora_settings import LoRASettings
from custom_components.config.reading import load_settings
from custom_components.datasets.training_data import Data
from custom_components.training.plan import plan_of
from tests.support.paths import PROJECT, TINY_LLAMA
from tests.support.recipe_runs import tune_run

# They say on top what a run of them needs.
READY = {path.stem: path for path in sorted(PROJECT.glob("configs/*.yaml")) if "\n# Memory: " in path.read_text()}
ROWS = {
    "mlabonne/guanaco-llama2-1k": {"text": "<s>[INST] Who is number N? [/INST] Nobody, as usual. </s>"},
    "tatsu-lab/alpaca": {"instruction": "Add the numbers.", "input": "1 and N", "output": "Many.", "text": "all of it"},
    "b-mc2/sql-create-context": {"question": "How many?", "context": "CREATE TABLE tN (n INTEGER)", "answer": "SELECT"},
}
NUM_ROWS = 120


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(PROJECT)


def settings_of(name, *overrides):
    return load_settings(LoRASettings, ["--config", f"configs/{name}.yaml", *overrides])


def trained_parameters(settings):
    with torch.device("meta"):
        model = instantiate(settings.model)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def at_tiny_scale(settings, folder):
    """Paths, device and sizes alone; the CPU has no fp16."""
    overrides = [
        *(f"checkpoint_dir={TINY_LLAMA}/checkpoint", f"output_dir={folder / 'out'}", "cache_dir=null", "device=cpu"),
        "model._component_=custom_components.models.lora_llama_from_config",
        f"model.checkpoint_dir={TINY_LLAMA}/checkpoint",
        "max_steps=2",
    ]
    if settings.dtype == "fp16":
        overrides.append("dtype=fp32")
    if (row := ROWS.get(settings.dataset["source"])) is not None:
        lines = (
            json.dumps({key: text.replace("N", str(number)) for key, text in row.items()}) for number in range(NUM_ROWS)
        )
        (folder / "rows.jsonl").write_text("\n".join(lines))
        overrides.append(f"dataset.source={folder / 'rows.jsonl'}")
    return overrides


@pytest.mark.parametrize("name", READY)
def test_a_ready_config_runs_at_tiny_scale(name, tmp_path):
    settings = settings_of(name)
    result = tune_run("--config", f"configs/{name}.yaml", *at_tiny_scale(settings, tmp_path))
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2]
    adapter = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (settings.lora_rank, settings.lora_alpha)
    assert len(adapter["target_modules"]) == len(settings.lora_attn_modules) + 3 * settings.apply_lora_to_mlp
    assert result.stdout.count("\nbefore  ") == result.stdout.count("\nafter   ") == len(settings.sample_prompts)


@pytest.mark.parametrize("name", READY)
def test_a_ready_config_says_its_launch_line_memory_and_time_first(name):
    header = READY[name].read_text().partition("# ---- Paths")[0]
    assert re.search(rf"^#   tune download \S+ --output-dir {settings_of(name).checkpoint_dir}\b", header, re.MULTILINE)
    assert f"#   tune run recipes/lora_single_device.py --config configs/{name}.yaml\n" in header
    assert "\n# Memory: " in header and "\n# Time: " in header


def test_guanaco_trains_what_the_project_it_follows_trains():
    settings = settings_of("guanaco_7b_chat_qlora")
    # Two matrices of each of 32 layers, of 4096 x 4096: r (d_in + d_out) parameters each.
    assert trained_parameters(settings) == 32 * 2 * 32 * (4096 + 4096)
    assert settings.packed and settings.max_seq_len == 256


@pytest.mark.parametrize("name", [name for name in READY if name.startswith("own_pairs")])
def test_own_pairs_plans_78_steps_and_saves_each_epoch(name):
    settings = settings_of(name, f"tokenizer.path={TINY_LLAMA}/checkpoint/tokenizer.model", "cache_dir=null")
    tokenizer = instantiate(settings.tokenizer)
    data = Data(instantiate(settings.dataset, tokenizer=tokenizer), None, tokenizer)
    plan = plan_of(settings, data.train.lengths, tokenizer.max_seq_len, has_validation=False)
    assert len(plan.steps) == 78 and plan.num_warmup_steps == 3
    assert [step.number for step in plan.steps if step.saves] == [26, 52, 78]
    assert {step.rate_factor for step in plan.steps[2:]} == {1.0}
    assert settings.keep_last_n_checkpoints == 3


def test_own_pairs_trains_5_324_800_parameters_of_open_llama_3b():
    assert trained_parameters(settings_of("own_pairs_openllama_3b_qlora")) == 5_324_800
    assert trained_parameters(settings_of("own_pairs_llama2_7b_chat_qlora")) == 8_388_608
