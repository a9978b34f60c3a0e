"""The experiments: each kind differs in the keys that it is about, and each config runs at tiny scale."""

import json

import pytest
import yaml

from custom_components.config.lora_settings import LoRASettings
from custom_components.config.reading import load_settings
from tests.support.paths import PROJECT, TINY_LLAMA
from tests.support.recipe_runs import tune_run

EXPERIMENTS = {path.stem: path for path in sorted(PROJECT.glob("configs/experiments/*.yaml"))}
ABOUT = {
    "rank": {"lora_rank", "lora_alpha", "lora_attn_modules", "apply_lora_to_mlp"},
    "base": {"quantization"},
}


def test_the_grids_are_there():
    ranks = [f"rank_{rank}_{targets}" for rank in (8, 64) for targets in ("qv", "all_linear")]
    bases = [f"base_{format}" for format in ("nf4", "nf4_single", "int8", "none")]
    assert set(EXPERIMENTS) == {*ranks, *bases}
    # All have every key that the config they are made from has.
    of_alpaca = yaml.safe_load((PROJECT / "configs/alpaca_7b_qlora.yaml").read_text())
    for path in EXPERIMENTS.values():
        assert list(yaml.safe_load(path.read_text())) == list(of_alpaca), path


@pytest.mark.parametrize("kind", ABOUT)
def test_experiments_of_a_kind_differ_in_what_they_are_about(kind):
    configs = {name: yaml.safe_load(path.read_text()) for name, path in EXPERIMENTS.items() if name.startswith(kind)}
    first = next(iter(configs.values()))
    for name, config in configs.items():
        differing = {key for key in config if config[key] != first[key]}
        assert differing <= ABOUT[kind] | {"output_dir"}, name
        assert config["output_dir"] == f"outputs/experiments/{name}"
    assert len({json.dumps([config[key] for key in sorted(ABOUT[kind])]) for config in configs.values()}) == 4


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_says_its_launch_lines_and_is_read(name, monkeypatch):
    monkeypatch.chdir(PROJECT)
    settings = load_settings(LoRASettings, ["--config", f"configs/experiments/{name}.yaml"])
    header = EXPERIMENTS[name].read_text().partition("# ---- Paths")[0]
    assert f"#   tune run recipes/lora_single_device.py --config configs/experiments/{name}.yaml\n" in header
    assert f"run_dirs=['outputs/experiments/{name.partition('_')[0]}_*']" in header
    assert settings.lora_alpha == 2 * settings.lora_rank


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_runs_at_tiny_scale(name, tmp_path):
    result = tune_run(
        *("--config", f"configs/experiments/{name}.yaml", f"checkpoint_dir={TINY_LLAMA}/checkpoint", "device=cpu"),
        *("model._component_=custom_components.models.lora_llama_from_config", "max_steps=2", "cache_dir=null"),
        *(f"model.checkpoint_dir={TINY_LLAMA}/checkpoint", f"output_dir={tmp_path / 'out'}", "val_fraction=0.1"),
        *(f"dataset.source={TINY_LLAMA}/data/train.jsonl", "prompt_template=llama2"),
    )
    assert result.returncode == 0, result.stderr
    metrics = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics if "loss" in record] == [1, 2]
    assert any("val_loss" in record for record in metrics)
