"""L33: no command deletes or overwrites what this project did not write, whatever the paths, links and overrides."""

from pathlib import Path

import pytest
import yaml

from custom_components.config.checks import known_annotations, union_members
from custom_components.config.distributed_settings import DistributedSettings
from custom_components.config.full_settings import FullSettings
from custom_components.config.lora_settings import LoRASettings
from custom_components.config.preference_settings import PreferenceSettings
from custom_components.config.reading import load_settings
from custom_components.config.task_settings import (
    ComparisonSettings,
    EvaluationSettings,
    GenerationSettings,
    MergeSettings,
)
from custom_components.config.training_kinds import AnyTrainingSettings, PreviewSettings
from custom_components.runtime.errors import UserError
from tests.support.paths import PROJECT, snapshot
from tests.support.recipe_runs import run_here

DISK_LOGGER = "torchtune.training.metric_logging.DiskLogger"
TRAINING_PATHS = [
    *("checkpoint_dir", "output_dir", "init_adapter_from", "resume_from_checkpoint", "cache_dir"),
    *("model.checkpoint_dir", "tokenizer.path", "tokenizer.adapter_dir", "dataset.source", "dataset.cache_dir"),
    *("dataset_val.source", "dataset_val.cache_dir", "metric_logger.log_dir", "metric_logger.filename"),
]
# Every path of every recipe.
PATHS = {
    "lora_single_device": ("configs/tiny_qlora.yaml", LoRASettings, TRAINING_PATHS),
    "lora_distributed": ("configs/tiny_qlora.yaml", DistributedSettings, TRAINING_PATHS),
    "lora_dpo_single_device": ("configs/tiny_dpo.yaml", PreferenceSettings, TRAINING_PATHS),
    "full_single_device": (
        "configs/tiny_full.yaml",
        FullSettings,
        [path for path in TRAINING_PATHS if path != "init_adapter_from"],
    ),
    "preview": ("configs/tiny_qlora.yaml", PreviewSettings, [*TRAINING_PATHS, "output_file"]),
    "estimate": ("configs/tiny_qlora.yaml", LoRASettings, TRAINING_PATHS),
    "generate": (
        "configs/generate.yaml",
        GenerationSettings,
        ["checkpoint_dir", "adapter_dir", "prompts_file", "output_file"],
    ),
    "evaluate": (
        "configs/evaluate.yaml",
        EvaluationSettings,
        ["checkpoint_dir", "adapter_dir", "output_file", "cache_dir", "dataset.source", "dataset.cache_dir"],
    ),
    "merge": ("configs/merge.yaml", MergeSettings, ["checkpoint_dir", "adapter_dir", "output_dir"]),
    "compare_runs": ("configs/compare_runs.yaml", ComparisonSettings, ["output_file"]),
}
LOGGER = f"metric_logger={{_component_: {DISK_LOGGER}, log_dir: logs, filename: log.txt}}"
WORDS = "a shell variable may be unset"


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(PROJECT)


def test_every_path_is_in_the_table():
    """Those of the settings by their types; of the components that the configs name, by their types and names."""
    names = {"source", "path", "dir", "file", "filename"}
    for recipe, (config, settings_type, paths) in PATHS.items():
        values = yaml.safe_load((PROJECT / config).read_text()) | {"metric_logger": {"_component_": DISK_LOGGER}}
        annotations = known_annotations(settings_type, values)
        found = {
            key
            for key, annotation in annotations.items()
            if Path in union_members(annotation) or ("." in key and key.rpartition(".")[2].rpartition("_")[2] in names)
        }
        assert found - set(paths) == set(), recipe
    assert set(PATHS) == {path.stem for path in (PROJECT / "recipes").glob("[!_]*.py")}


@pytest.mark.parametrize("empty", ["", "  ", "\t"])
@pytest.mark.parametrize(("recipe", "key"), [(recipe, key) for recipe, (_, _, keys) in PATHS.items() for key in keys])
def test_L33_an_empty_path_is_an_error(tmp_path, recipe, key, empty):
    """It would be the working directory, or as good as null: `output_dir=$OUT` where OUT is not set."""
    config, settings_type, _ = PATHS[recipe]
    logger = [LOGGER] if key.startswith("metric_logger") else []
    with pytest.raises(UserError) as error:
        load_settings(settings_type, ["--config", config, *logger, f"{key}={empty}"])
    [message] = error.value.messages
    assert message.startswith(f"{key}: {empty!r} should be") and WORDS in message and f"'{key}=" in message

    values = yaml.safe_load((PROJECT / config).read_text())
    node, _, name = key.rpartition(".")
    if node == "metric_logger":
        values[node] = {"_component_": DISK_LOGGER, "log_dir": "logs", "filename": "log.txt"}
    (values[node] if node else values)[name] = empty
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=f"{key}: .*{WORDS}"):
        load_settings(settings_type, ["--config", str(tmp_path / "config.yaml")])


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("merge", ["adapter_dir=null", "adapters=[{dir: a}, {dir: ''}]"]),
        ("lora_single_device", ["dataset.source=[{source: a.jsonl}, {source: ' '}]"]),
        ("lora_single_device", ["dataset_val.source=[{source: ''}]"]),
        ("evaluate", ["dataset.source=[{source: '', weight: 2}]"]),
        ("evaluate", ["tasks=[hellaswag, '']"]),
        ("compare_runs", ["run_dirs=[outputs/a, '']"]),
        ("compare_runs", ["evaluations=['']"]),
    ],
)
def test_L33_an_empty_path_in_a_list_is_an_error(recipe, overrides):
    config, settings_type, _ = PATHS[recipe]
    with pytest.raises(UserError, match=WORDS):
        load_settings(settings_type, ["--config", config, *overrides])


@pytest.mark.parametrize("config", ["", " "])
def test_an_empty_config_is_an_error(config):
    with pytest.raises(UserError, match=WORDS):
        load_settings(LoRASettings, ["--config", config])


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Everything that a recipe reads, each in a folder of its own, and a home directory; all of it is not ours."""
    folders = ["base", "adapter", "second", "data", "cache", "work", "home"]
    for name in folders:
        (tmp_path / name).mkdir()
        (tmp_path / name / "of others").write_text(name)
    for name in ("rows.jsonl", "more.jsonl", "questions.jsonl"):
        (tmp_path / "data" / name).write_text("{}")
    (tmp_path / "base/tokenizer.model").write_text("tokenizer")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def disguises(world: Path, name: str) -> list[str]:
    """Other ways to write a path in the world, of which `linked` is a link to the world."""
    return [
        *(f"{world}/{name}", f"{world}/{name}/", f"{world}//{name}/.", f"{world}/work/../{name}", f"../{name}"),
        *(f"~/../{name}", f"{world}/linked/{name}", f"{world}/not there/../{name}", f"../linked/work/../{name}/"),
    ]


# By recipe: the overrides that name each input, with the folder of the world that it is in.
INPUTS = {
    "lora_single_device": {
        "checkpoint_dir": ("base", "checkpoint_dir={}/base"),
        "init_adapter_from": ("adapter", "init_adapter_from={}/adapter"),
        "cache_dir": ("cache", "cache_dir={}/cache"),
        "model.checkpoint_dir": ("base", "model.checkpoint_dir={}/base"),
        "tokenizer.path": ("base", "tokenizer.path={}/base/tokenizer.model"),
        "dataset.source": ("data", "dataset.source={}/data"),
        "a file": ("data", "dataset.source={}/data/rows.jsonl"),
        "a glob": ("data", "dataset.source={}/d*/*.jsonl"),
        "a list": ("data", "dataset.source=[{{source: {}/data/rows.jsonl}}, {{source: owner/name}}]"),
        "dataset.cache_dir": ("cache", "dataset.cache_dir={}/cache"),
        "dataset_val.source": ("data", "dataset_val.source={}/data/more.jsonl"),
        "dataset_val list": ("data", "dataset_val.source=[{{source: {}/data, weight: 2}}]"),
        "dataset_val.cache_dir": ("cache", "dataset_val.cache_dir={}/cache"),
    },
    "merge": {
        "checkpoint_dir": ("base", "checkpoint_dir={}/base"),
        "adapter_dir": ("adapter", "adapter_dir={}/adapter"),
        "adapters": ("second", "adapters=[{{dir: {0}/adapter}}, {{dir: {0}/second}}]"),
    },
}
INPUTS["preview"] = INPUTS["estimate"] = INPUTS["lora_single_device"]
INPUTS["full_single_device"] = {
    name: place for name, place in INPUTS["lora_single_device"].items() if name != "init_adapter_from"
}
FILES = {"tokenizer.path", "a file", "a glob", "a list", "dataset_val.source"}


@pytest.mark.parametrize(("recipe", "name"), [(recipe, name) for recipe, inputs in INPUTS.items() for name in inputs])
def test_L33_output_dir_is_apart_from_what_is_read(world, recipe, name):
    folder, override = INPUTS[recipe][name]
    others = ["adapter_dir=null"] if name == "adapters" else []
    (world / "linked").symlink_to(world, target_is_directory=True)
    before = snapshot(world)

    def assert_refused(output_dir, *overrides):
        config = str(PROJECT / PATHS[recipe][0])
        code, _, err = run_here(
            recipe, "--config", config, "overwrite_output_dir=true", *overrides, f"output_dir={output_dir}"
        )
        assert code == 2 and len(err.splitlines()) == 1, (output_dir, err)
        assert err.startswith("error: output_dir: ") and "name a directory apart from that" in err, (output_dir, err)
        assert snapshot(world) == before

    for place in [folder] if name in FILES else [folder, f"{folder}/new"]:
        for output_dir in disguises(world, place):
            assert_refused(output_dir, override.format(world), *others)
    assert_refused(f"{world}/{folder}", override.format(world / "linked"), *others)


@pytest.mark.parametrize("recipe", ["lora_single_device", "preview", "estimate", "merge"])
@pytest.mark.parametrize(
    "output_dir",
    [".", "./", "..", "{}/work", "{}", "{}/home", "~", "~/.", "~/../work", "/", "//", "{project}", "{link}"],
)
def test_L33_output_dir_is_not_where_people_are(world, recipe, output_dir):
    config, _, _ = PATHS[recipe]
    (world / "link").symlink_to(world / "home")
    before = snapshot(world)
    output_dir = output_dir.replace("{}", str(world)).format(project=PROJECT, link=world / "link")
    code, _, err = run_here(
        recipe, "--config", str(PROJECT / config), "overwrite_output_dir=true", f"output_dir={output_dir}"
    )
    assert code == 2 and err.startswith("error: output_dir: ") and "name a directory apart" in err, err
    assert snapshot(world) == before


def test_L33_case_does_not_fool_where_the_file_system_ignores_it(world, monkeypatch):
    """Such a file system says of both names that they are the same directory."""

    def same_but_for_case(path, other):
        return str(path).casefold() == str(other).casefold()

    monkeypatch.setattr(Path, "samefile", same_but_for_case)
    config, settings_type, _ = PATHS["lora_single_device"]
    for output_dir in (world / "BASE", world / "Base/new"):
        with pytest.raises(UserError, match=r"output_dir: .* checkpoint_dir"):
            load_settings(
                settings_type,
                ["--config", str(PROJECT / config), f"checkpoint_dir={world}/base", f"output_dir={output_dir}"],
            )


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("lora_single_device", ["checkpoint_dir={}/base", "output_dir={}/out", "dataset.source={}/data"]),
        ("lora_single_device", ["checkpoint_dir={}/base", "output_dir={}/base-tuned"]),
        ("lora_single_device", ["output_dir={}/out", "init_adapter_from={}/other/adapter"]),
        ("lora_single_device", ["output_dir={}/out", "resume_from_checkpoint={}/out/checkpoints/step_000003"]),
        ("lora_single_device", ["output_dir={}/out", "resume_from_checkpoint={}/out"]),
        ("lora_single_device", ["output_dir={}/out", "resume_from_checkpoint={}/other/checkpoints/step_000003"]),
        ("lora_single_device", ["output_dir=owner", "dataset.source=owner/name"]),
        ("lora_single_device", ["output_dir=out", "dataset.source=../data/*.jsonl"]),
        ("lora_single_device", ["output_dir={}/work/out", "dataset.source={}/data/rows.jsonl", "cache_dir=cache"]),
        ("merge", ["checkpoint_dir={}/base", "adapter_dir={}/out/adapter", "output_dir={}/out/merged"]),
        ("merge", ["checkpoint_dir={}/base", "adapter_dir={}/out/adapter", "output_dir={}/merged"]),
    ],
)
def test_outputs_beside_what_is_read_are_right(world, recipe, overrides):
    config, settings_type, _ = PATHS[recipe]
    (world / "work/owner").mkdir()
    load_settings(
        settings_type, ["--config", str(PROJECT / config), *(override.format(world) for override in overrides)]
    )


def test_no_run_is_written_into_a_single_checkpoint(world):
    config, settings_type, _ = PATHS["lora_single_device"]
    step = world / "run/checkpoints/step_000003"
    for output_dir in (step, step / "adapter"):
        with pytest.raises(UserError, match="output_dir: .* is inside resume_from_checkpoint"):
            load_settings(
                settings_type,
                ["--config", str(PROJECT / config), f"output_dir={output_dir}", f"resume_from_checkpoint={step}"],
            )


def test_the_shipped_configs_are_right():
    for config in sorted((PROJECT / "configs").glob("*.yaml")):
        settings_type = {
            "generate": GenerationSettings,
            "evaluate": EvaluationSettings,
            "merge": MergeSettings,
            "compare_runs": ComparisonSettings,
        }.get(config.stem, AnyTrainingSettings)
        load_settings(settings_type, ["--config", str(config)])
