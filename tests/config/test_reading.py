"""Configs and overrides. L26: what is wrong is named, all of it, before anything is loaded."""

import re

import pytest
import yaml

from custom_components.config.component_checks import component_nodes
from custom_components.config.distributed_settings import DistributedSettings
from custom_components.config.full_settings import FullSettings
from custom_components.config.lora_settings import LoRASettings
from custom_components.config.preference_settings import PreferenceSettings
from custom_components.config.reading import config_text, load_settings
from custom_components.config.task_settings import (
    ComparisonSettings,
    EvaluationSettings,
    GenerationSettings,
    MergeSettings,
)
from custom_components.config.training_kinds import AnyTrainingSettings, PreviewSettings
from custom_components.runtime.errors import UserError
from tests.support.forked_tune import ForkedTune
from tests.support.paths import PROJECT

SETTINGS = {
    "lora_single_device": LoRASettings,
    "lora_dpo_single_device": PreferenceSettings,
    "full_single_device": FullSettings,
}
# Each with the settings of the recipe that its last command names.
TRAINING_CONFIGS = [
    (path, SETTINGS[recipes[-1]])
    for path in sorted(PROJECT.glob("configs/*.yaml"))
    if (recipes := re.findall(r"run recipes/(\w+)\.py", path.read_text())) and recipes[-1] in SETTINGS
]
TINY = PROJECT / "configs/tiny_qlora.yaml"
# Components that take the settings as they are.
READERS = ("config/*settings.py", "training/plan.py", "runs/*.py", "memory/*.py", "recipe_parts/*.py")


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(PROJECT)


def training_settings(*overrides, config=TINY):
    return load_settings(LoRASettings, ["--config", str(config), *overrides])


def generation_settings(*overrides):
    return load_settings(GenerationSettings, ["--config", "configs/generate.yaml", *overrides])


def problems(*overrides, config=TINY):
    with pytest.raises(UserError) as error:
        training_settings(*overrides, config=config)
    return error.value.messages


@pytest.mark.parametrize(("config", "settings_type"), TRAINING_CONFIGS, ids=lambda value: getattr(value, "name", ""))
def test_configs_are_right_and_complete(config, settings_type):
    """Every key there is, each with its effect in a comment."""
    assert len(TRAINING_CONFIGS) >= 17
    # Those of several devices are those of one, and two more.
    kind = DistributedSettings if settings_type is LoRASettings else settings_type
    assert type(load_settings(AnyTrainingSettings, ["--config", str(config)])) is kind
    text = config.read_text()
    assert set(yaml.safe_load(text)) == set(settings_type.model_fields)
    for line in text[text.index("# ---- Paths") :].splitlines():
        is_component_or_passed_on = re.search(r"_component_|\$\{|:$|^ +- ", line)
        assert "#" in line or not line.strip() or is_component_or_passed_on or "weight_decay" in line, line
    assert f"--config configs/{config.name}" in text


def test_generation_config_is_right_and_complete():
    generation_settings()
    assert set(yaml.safe_load((PROJECT / "configs/generate.yaml").read_text())) == set(GenerationSettings.model_fields)


def test_evaluation_config_is_right_and_complete():
    load_settings(EvaluationSettings, ["--config", "configs/evaluate.yaml"])
    text = (PROJECT / "configs/evaluate.yaml").read_text()
    assert set(yaml.safe_load(text)) == set(EvaluationSettings.model_fields)
    for line in text[text.index("# ---- Paths") :].splitlines():
        assert "#" in line or not line.strip() or re.search(r"_component_|\$\{", line), line


def test_comparison_config_is_right_and_complete():
    load_settings(ComparisonSettings, ["--config", "configs/compare_runs.yaml"])
    text = (PROJECT / "configs/compare_runs.yaml").read_text()
    assert set(yaml.safe_load(text)) == set(ComparisonSettings.model_fields)


@pytest.mark.parametrize("config", sorted(PROJECT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_tune_validate_passes(config):
    result = ForkedTune("validate", str(config)).result()
    assert "well-formed" in result.stdout, result.stderr


def test_every_key_is_read_and_every_key_read_is_a_setting():
    """A key that no code reads would be a promise without effect."""
    readers = ["recipes/*.py", *(f"custom_components/{pattern}" for pattern in READERS)]
    code = "\n".join(path.read_text() for pattern in readers for path in PROJECT.glob(pattern))
    tasks = (PreviewSettings, GenerationSettings, EvaluationSettings, MergeSettings, ComparisonSettings)
    for settings_type in (*SETTINGS.values(), *tasks):
        for name in settings_type.model_fields:
            passed_on = any(f"{name}: ${{{name}}}" in config.read_text() for config, _ in TRAINING_CONFIGS)
            assert passed_on or re.search(rf"(settings|self)\.{name}\b", code) or f'("{name}"' in code, name


@pytest.mark.parametrize(
    ("before", "today"),
    [
        ("model._component_=custom_components.builders.lora_llama_from_config", "models.lora_llama_from_config"),
        ("lr_scheduler._component_=custom_components.schedules.linear", "training.schedules.linear"),
        ("loss={_component_: custom_components.loss.LinearCrossEntropy}", "training.loss.LinearCrossEntropy"),
    ],
)
def test_component_paths_of_before_the_rooms_are_read_as_todays_and_said_once(capsys, before, today):
    settings = training_settings(before, "model.lora_rank=8", before)
    key = before.partition("=")[0].partition(".")[0]
    assert getattr(settings, key)["_component_"] == f"custom_components.{today}"
    [line] = capsys.readouterr().out.splitlines()
    assert line.endswith(f" is now custom_components.{today}: read as that")


def test_overrides_reach_the_nodes_that_refer_to_them():
    settings = training_settings("lora_rank=32", "optimizer.lr=5e-5", "lora_attn_modules=[o_proj]", "lora_rank=48")
    assert settings.lora_rank == settings.model["lora_rank"] == 48
    assert settings.optimizer["lr"] == 5e-5
    assert settings.model["lora_attn_modules"] == ["o_proj"]


@pytest.mark.parametrize(
    "text",
    [
        "Answer: one word",
        "yes",
        "[INST] hi",
        "2 + 2 = 4, is it?",
        "${lora_rank} costs ${5}",
        "null",
        "'quoted' \"twice\"",
        "",
        "{a: b",
        " ~ # no comment",
        "12",
        "ünïcode\nnewline",
    ],
)
def test_text_is_taken_verbatim(text):
    assert generation_settings(f"prompt={text}").prompt == text


def test_text_beside_null():
    assert generation_settings("system_prompt=null").system_prompt is None
    assert generation_settings("system_prompt=yes").system_prompt == "yes"
    assert str(generation_settings("adapter_dir=a: b").adapter_dir) == "a: b"
    assert training_settings("tokenizer.system_prompt=Be: kind").tokenizer["system_prompt"] == "Be: kind"
    assert training_settings("dataset.source=1").dataset["source"] == "1"


def test_delete_a_key():
    assert "split" not in training_settings("~dataset.split").dataset
    assert training_settings("~sample_prompts").sample_prompts == []
    assert "there is no key 'dataset.splits' to delete; did you mean 'dataset.split'?" in problems("~dataset.splits")[0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lora_rnak=32", "lora_rnak: unknown key; did you mean 'lora_rank'?"),
        ("lr=1e-4", "lr: unknown key; here it is 'learning_rate'"),
        ("optimizer.learning=1", "optimizer.learning: unknown key of torch.optim.AdamW"),
        ("model.lora_rnak=32", "did you mean 'model.lora_rank'?"),
        ("dataset.sauce=x", "did you mean 'dataset.source'?"),
        ("tokenizer.max_len=3", "did you mean 'tokenizer.max_seq_len'?"),
        ("lora_attn_modules=[q_prj]", "lora_attn_modules: 'q_prj' should be 'q_proj', 'k_proj'"),
        ("quantize_base='False'", "quantize_base: 'False' should be a valid boolean"),
        ("lora_rank=2.5", "lora_rank: 2.5 should be a valid integer"),
        ("lora_rank=0", "lora_rank: 0 should be greater than 0"),
        ("lora_dropout=1.0", "lora_dropout: 1.0 should be less than 1"),
        ("optimizer.lr=fast", "optimizer.lr: 'fast' should be a valid number"),
        ("optimizer.fused=maybe", "optimizer.fused: 'maybe' should be a valid boolean"),
        ("model._component_=custom_components.models.lama", "cannot be imported"),
        ("model._component_=custom_components.models.llama", "is a module, not a function or class"),
        ("device=mps", "device: 'mps' should be auto or cpu: Apple's GPU is not supported, because 4-bit NF4"),
        ("device=gpu", "device: 'gpu' should be cuda"),
        ("device=cuda0", "device: 'cuda0' should be cuda:0 ("),
        ("device=1", "device: '1' should be cuda:1 ("),
        ("device=CUDA", "device: 'CUDA' should be cuda"),
        ("device=rocm", "device: 'rocm' should be cuda, torch's name of NVIDIA's and AMD's cards"),
        ("device=xpu", "device: 'xpu' should be auto, cpu, cuda or cuda:N"),
        ("dtype=float64", "dtype: 'float64' should be 'auto', 'bf16', 'fp16' or 'fp32'"),
        ("dtype=torch.int8", "dtype: 'torch.int8' should be 'auto', 'bf16', 'fp16' or 'fp32'"),
        ("epochs=0", "epochs: 0 should be greater than 0"),
        ("epochs=.inf", "epochs: "),
        ("max_steps=0", "max_steps: 0 should be greater than 0"),
        ("learning_rate=0", "learning_rate: 0 should be greater than 0"),
        ("learning_rate=fast", "learning_rate: 'fast' should be a valid number"),
        ("optimizer.params=1", "the recipe gives this argument itself"),
        ("~optimizer._component_", "optimizer._component_: missing"),
        ("~tokenizer.path", "tokenizer.path: missing"),
        ("~epochs", "epochs: missing: this key has no default"),
        ("epochs=", "epochs: None should be a valid integer or a valid number"),
        ("dataset=rows.jsonl", "dataset: 'rows.jsonl' should be an object"),
        ("epochs.x=1", "'epochs' is 2, which has no keys of its own"),
        ("lora_rank", "is not an override"),
        ("--lora_rank=4", "is not an override"),
        ("lora_rank=${lora_rnak}", "lora_rank: Interpolation key 'lora_rnak' not found"),
        ("lora_rank=${lora_rank}", "lora_rank: "),
        ("sample_prompts=['${nothing}']", "sample_prompts: Interpolation key 'nothing' not found"),
        ("lora_rank=[", "not valid YAML"),
    ],
)
def test_L26_what_is_wrong_is_named_with_its_origin(override, words):
    [message] = problems(override)
    assert words in message
    assert repr(override) in message


def test_L26_nothing_to_train():
    assert "nothing to train" in problems("lora_attn_modules=[]", "apply_lora_to_mlp=false")[0]


def test_L26_all_problems_at_once_with_their_lines(tmp_path):
    config = tmp_path / "wrong.yaml"
    text = TINY.read_text().replace("lora_alpha: 32", "lora_alfa: 32").replace("  fused: true", "  fuzed: true")
    config.write_text(text)
    messages = problems("epochs=-1", config=config)
    assert len(messages) == 4

    def line_of(key):
        return next(number for number, line in enumerate(text.splitlines(), 1) if line.strip().startswith(f"{key}:"))

    joined = "\n".join(messages)
    assert f"lora_alfa: unknown key; did you mean 'lora_alpha'? ({config}:{line_of('lora_alfa')})" in joined
    assert f"({config}:{line_of('fuzed')})" in joined
    assert "lora_alpha: missing" in joined
    assert "epochs: -1 should be greater than 0 (override 'epochs=-1')" in joined


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("- a\n- b\n", "a config is a mapping"),
        ("a: [b\n", "not valid YAML"),
        ("", "a config is a mapping"),
        (b"\xff\xfe\x00", "cannot be read as text"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, words):
    config = tmp_path / "config.yaml"
    config.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words):
        load_settings(LoRASettings, ["--config", str(config)])


def test_no_config_and_one_that_is_not_there():
    with pytest.raises(UserError, match="--config is missing"):
        load_settings(LoRASettings, ["lora_rank=3"])
    with pytest.raises(UserError, match="no such file"):
        load_settings(LoRASettings, ["--config=nothing.yaml"])


def test_a_key_written_twice_keeps_the_last_value(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(TINY.read_text() + "\nlora_rank: 5\n")
    assert training_settings(config=config).lora_rank == 5


def test_the_written_config_reads_back(tmp_path):
    settings = training_settings("dataset.source=a ${b}: c", "lora_rank=7")
    (tmp_path / "config.yaml").write_text(config_text(settings), encoding="utf-8")
    text = (tmp_path / "config.yaml").read_text().replace("${b}", "\\${b}")
    (tmp_path / "config.yaml").write_text(text)
    assert training_settings(config=tmp_path / "config.yaml") == settings


def test_every_training_node_with_a_component_is_checked():
    assert set(component_nodes(LoRASettings)) == {
        "model", "tokenizer", "dataset", "dataset_val", "optimizer", "lr_scheduler", "loss", "metric_logger",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("spelled", "name"),
    [("bfloat16", "bf16"), ("torch.float16", "fp16"), ("half", "fp16"), ("float32", "fp32"), ("float", "fp32")],
)
def test_torchs_spelling_of_a_dtype_is_understood(spelled, name):
    assert training_settings(f"dtype={spelled}").dtype == name
    assert generation_settings(f"dtype={spelled}").dtype == name


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
def test_devices(device):
    assert generation_settings(f"device={device}").device == device
