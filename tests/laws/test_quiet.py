"""Commands print what this project says and nothing else: no library's warning, advice or log line."""

import re

import pytest
import yaml

from custom_components.transforms.prompt_format import PromptFormat
from custom_components.weights.adapters import save_adapter
from tests.support.forked_tune import ForkedTune
from tests.support.models import loaded_model, with_random_adapters
from tests.support.paths import PROJECT, TINY_LLAMA
from tests.support.terminal import Terminal
from tests.support.tune_process import python_process
from tests.support.written_runs import step_records, write_run

RECIPES = sorted(path.stem for path in PROJECT.glob("recipes/[!_]*.py"))
CHECKPOINT = f"checkpoint_dir={TINY_LLAMA}/checkpoint"
ROWS = f"dataset.source={TINY_LLAMA}/data/val.jsonl"
ON_TINY = ["--config", "configs/tiny_qlora.yaml", "device=cpu", "cache_dir=null"]
PROGRESS = re.compile(r"step \d+/\d+, loss [\d.]+, [\d.]+ s/step, .+ left|\s*\d+%\|.*\| \d+/\d+ \[.*\]")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quiet") / "adapter"
    model = with_random_adapters(loaded_model(TINY_LLAMA / "checkpoint"))
    save_adapter(model, directory, "tiny", PromptFormat("llama2", None, ["</s>"]).texts())
    return directory


def of_libraries(text):
    """The lines that are not progress of ours."""
    return [line for line in re.split(r"[\r\n]+", text) if line.strip() and not PROGRESS.fullmatch(line)]


@pytest.mark.parametrize(
    "first",
    [
        *("recipes", "custom_components.runtime.tune_startup"),
        *(pytest.param(first, marks=pytest.mark.slow) for first in ("examples.tiny_llama.demo", "benchmarks")),
    ],
)
def test_importing_everything_prints_nothing(first):
    """`first` is what a command imports before any library; torchao warned before it could be told not to."""
    modules = [first, *(f"recipes.{recipe}" for recipe in RECIPES), "datasets", "matplotlib.pyplot"]
    code = f"import {', '.join(modules)}\n"
    code += "from custom_components.runtime.quiet_bitsandbytes import import_bitsandbytes; import_bitsandbytes()\n"
    code += "import matplotlib.font_manager; matplotlib.font_manager._load_fontmanager(try_read_cache=False)"
    result = python_process("-c", code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


COMMANDS = {
    "lora_single_device": [
        *(*ON_TINY, "max_steps_per_epoch=2", "epochs=1", "sample_prompts=[Who]", ROWS),
        "optimizer={_component_: bitsandbytes.optim.AdamW8bit, lr: 1e-4}",
    ],
    "full_single_device": ["--config", "configs/tiny_full.yaml", "cache_dir=null", "max_steps=2", ROWS],
    "lora_distributed": [*ON_TINY, "max_steps=1", "dataset.max_rows=8"],
    "lora_single_device, compiled": [*ON_TINY, "max_steps=1", "dataset.max_rows=8", "compile=true"],
    "lora_single_device, logged": [
        *(*ON_TINY, "max_steps=1", "dataset.max_rows=8"),
        "metric_logger={_component_: torchtune.training.metric_logging.TensorBoardLogger, log_dir: OUT/logs}",
    ],
    "lora_dpo_single_device": [
        *("--config", "configs/tiny_dpo.yaml", "device=cpu", "cache_dir=null", "max_steps=1", "dataset.max_rows=8"),
    ],
    "preview": [*ON_TINY, ROWS],
    "estimate": [*ON_TINY, "batch_size=2"],
    "generate": ["--config", "configs/generate.yaml", CHECKPOINT, "prompt=Who?", "max_new_tokens=3", "device=cpu"],
    "evaluate": ["--config", "configs/evaluate.yaml", CHECKPOINT, ROWS, "dataset.max_rows=8", "cache_dir=null"],
    "evaluate, tasks": [*("--config", "configs/evaluate.yaml", CHECKPOINT, "dataset=null"), "tasks=[OUT/task.yaml]"],
    "compare_runs": [
        *("--config", "configs/compare_runs.yaml", "run_dirs=[OUT/a_run, OUT/another_run]"),
        "output_file=OUT/report.html",
    ],
    "merge": ["--config", "configs/merge.yaml", CHECKPOINT],
    "merge, gguf": ["--config", "configs/merge.yaml", CHECKPOINT, "format=gguf", "prove=false"],
}
SLOW = ["lora_single_device, compiled", "lora_distributed"]
PACKAGES = {
    "evaluate, tasks": "lm_eval",
    "lora_single_device, logged": "tensorboard",
    "merge, gguf": "gguf",
}
# Words that no terminal could break: paths, tables and commands, which are indented.
UNBROKEN = re.compile(r"\s.*|\S*")


def test_every_recipe_is_tried():
    assert {name.partition(",")[0] for name in COMMANDS} == set(RECIPES)


@pytest.fixture
def task(tmp_path):
    """A task of lm-eval, `task.yaml`."""
    (tmp_path / "docs.jsonl").write_text('{"question": "Who?", "answer": "Nobody."}\n')
    task = {
        **{"task": "who", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{tmp_path}/docs.jsonl"}}},
        **{"test_split": "test", "output_type": "generate_until", "doc_to_text": "{{question}}"},
        **{"doc_to_target": "{{answer}}", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}},
        "metric_list": [{"metric": "exact_match"}],
    }
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))


@pytest.mark.usefixtures("task")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in COMMANDS]
)
def test_a_recipe_prints_what_is_ours_only_in_80_columns(name, adapter, tmp_path):
    """To a terminal; stderr is a file."""
    pytest.importorskip(PACKAGES.get(name, "torch"))
    recipe = name.partition(",")[0]
    overrides = []
    if recipe == "compare_runs":
        for number, run in enumerate(("a_run", "another_run"), start=1):
            write_run(tmp_path / run, f"learning_rate={number}e-4", records=step_records([3.0, 2.0]))
    if recipe in ("generate", "evaluate", "merge"):
        overrides += [f"adapter_dir={adapter}"]
    if recipe == "merge" or recipe.endswith("_single_device"):
        overrides += [f"output_dir={tmp_path / 'out'}"]
    command = [argument.replace("OUT", str(tmp_path)) for argument in COMMANDS[name]]
    terminal = Terminal()
    result = ForkedTune("run", f"recipes/{recipe}.py", *command, *overrides, stdout=terminal.descriptor).result()
    printed = terminal.text()
    assert result.returncode == 0, result.stderr
    assert of_libraries(result.stderr) == []
    assert "warn" not in printed.lower()
    if recipe == "preview":
        printed = printed.rpartition("\n----\n")[2]  # after the rows, which are shown as they are
    assert [line for line in printed.splitlines() if len(line) > 80 and not UNBROKEN.fullmatch(line)] == []
