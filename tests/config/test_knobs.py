"""Top-level knobs reach the nodes that pass them on; what is typed wins over what is in the file, and that is said."""

import pytest
import yaml

from custom_components.config.lora_settings import LoRASettings
from custom_components.config.reading import config_text, load_settings
from custom_components.runtime.errors import UserError
from tests.support.paths import PROJECT

TINY = PROJECT / "configs/tiny_qlora.yaml"
SEVEN_B = PROJECT / "configs/llama2_7b_qlora.yaml"


def settings_of(config, *overrides):
    return load_settings(LoRASettings, ["--config", str(config), *overrides])


@pytest.fixture
def edited(tmp_path):
    """Writes tiny_qlora.yaml with keys set, nested ones dotted; None deletes one."""

    def write(**changes):
        values = yaml.safe_load(TINY.read_text())
        for dotted, value in changes.items():
            node, _, key = dotted.rpartition("__")
            parent = values[node] if node else values
            parent.pop(key) if value is None else parent.__setitem__(key, value)
        path = tmp_path / "edited.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture
def of_a_run(tmp_path):
    """The config that a run writes: all references resolved."""
    path = tmp_path / "config.yaml"
    path.write_text(config_text(settings_of(TINY)))
    assert "${" not in path.read_text()
    return path


@pytest.mark.parametrize("override", ["learning_rate=5e-5", "optimizer.lr=5e-5"])
@pytest.mark.parametrize("config", [TINY, SEVEN_B, "of_a_run", "old"])
def test_the_learning_rate_is_one_by_either_name(config, override, of_a_run, edited):
    config = {"of_a_run": of_a_run, "old": edited(learning_rate=None, optimizer__lr=1e-3)}.get(config, config)
    settings = settings_of(config, override)
    assert settings.learning_rate == settings.optimizer["lr"] == 5e-5
    before = settings_of(config)
    assert before.learning_rate == before.optimizer["lr"] > 0


def test_another_optimizer_brings_its_rate():
    settings = settings_of(TINY, "optimizer={_component_: torch.optim.SGD, lr: 0.5}")
    assert settings.learning_rate == settings.optimizer["lr"] == 0.5


@pytest.mark.parametrize("typed", [["learning_rate=0.1", "optimizer.lr=0.2"], []])
def test_two_rates_are_refused(edited, typed):
    config = TINY if typed else edited(optimizer__lr=0.2, learning_rate=0.1)
    with pytest.raises(UserError, match=r"learning_rate: 0.1 beside optimizer.lr 0.2: write \$\{learning_rate\} there"):
        settings_of(config, *typed)


def test_a_runs_own_config_takes_overrides_of_its_knobs(of_a_run):
    settings = settings_of(of_a_run, "lora_rank=4", "max_seq_len=64", "checkpoint_dir=/else", "on_overlong=drop")
    assert settings.model["lora_rank"] == 4 and settings.tokenizer["max_seq_len"] == 64
    assert settings.tokenizer["path"] == "/else/tokenizer.model" and settings.model["checkpoint_dir"] == "/else"
    assert settings.dataset["on_overlong"] == "drop"
    assert settings_of(of_a_run) == settings_of(TINY)
    assert settings_of(of_a_run, "model.lora_rank=4").lora_rank == 16  # as with the config that the run began with


def test_a_knob_that_reaches_nothing_is_an_error(edited):
    config = edited(model__lora_rank=8)
    with pytest.raises(UserError, match=r"lora_rank: 32 does not reach model.lora_rank, which is 8 \(.*yaml:\d+\)"):
        settings_of(config, "lora_rank=32")
    assert settings_of(config, "lora_rank=32", "model.lora_rank=32").model["lora_rank"] == 32
    assert settings_of(config, "lora_rank=8").model["lora_rank"] == 8
    assert settings_of(config).model["lora_rank"] == 8


@pytest.mark.parametrize(
    ("config", "override", "given", "gone", "words"),
    [
        (SEVEN_B, "warmup_steps=100", ("warmup_steps", 100), ("warmup_ratio", 0.0), "warmup_ratio, 0.03"),
        (SEVEN_B, "warmup_steps=0", ("warmup_steps", 0), ("warmup_ratio", 0.0), "warmup_ratio, 0.03"),
        ("by steps", "warmup_ratio=0.5", ("warmup_ratio", 0.5), ("warmup_steps", None), "warmup_steps, 7"),
        ("by nodes", "val_fraction=0.5", ("val_fraction", 0.5), ("dataset_val", None), "dataset_val, its node"),
    ],
)
def test_of_two_alternatives_the_one_that_is_typed_counts_and_that_is_said(
    edited, capsys, config, override, given, gone, words
):
    config = edited(warmup_ratio=0.0, warmup_steps=7) if config == "by steps" else config
    config = TINY if config == "by nodes" else config
    settings = settings_of(config, override)
    assert (getattr(settings, given[0]), getattr(settings, gone[0])) == (given[1], gone[1])
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{given[0]} on the command line replaces {words} (") and ".yaml:" in line


@pytest.mark.parametrize("override", ["warmup_steps=null", "epochs=1", "warmup_ratio=0.1", "~warmup_steps"])
def test_what_gives_nothing_replaces_nothing(capsys, override):
    assert settings_of(SEVEN_B, override).warmup_ratio > 0
    assert capsys.readouterr().out == ""


def test_both_alternatives_typed_or_both_in_the_file_are_refused(edited):
    for config, typed in ((SEVEN_B, ["warmup_steps=3", "warmup_ratio=0.1"]), (edited(warmup_steps=3), [])):
        with pytest.raises(UserError, match="warmup_steps: 3 beside warmup_ratio"):
            settings_of(config, *typed)
