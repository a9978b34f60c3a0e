"""Commands print what this project says and nothing else: no library's warning, advice or log line."""

import re

import pytest

from custom_components.transforms.prompt_format import PromptFormat
from custom_components.weights.adapters import save_adapter
from tests.support.models import loaded_model, with_random_adapters
from tests.support.paths import PROJECT, TINY_LLAMA
from tests.support.recipe_runs import tune_run
from tests.support.tune_process import python_process

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
    ["recipes", "examples.tiny_llama.demo", "benchmarks", "custom_components.runtime.tune_startup"],
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
    "preview": [*ON_TINY, ROWS],
    "estimate": [*ON_TINY, "batch_size=2"],
    "generate": ["--config", "configs/generate.yaml", CHECKPOINT, "prompt=Who?", "max_new_tokens=3", "device=cpu"],
    "evaluate": ["--config", "configs/evaluate.yaml", CHECKPOINT, ROWS, "dataset.max_rows=8", "cache_dir=null"],
    "merge": ["--config", "configs/merge.yaml", CHECKPOINT],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_prints_what_is_ours_only(recipe, adapter, tmp_path):
    overrides = []
    if recipe in ("generate", "evaluate", "merge"):
        overrides += [f"adapter_dir={adapter}"]
    if recipe in ("merge", "lora_single_device", "full_single_device"):
        overrides += [f"output_dir={tmp_path / 'out'}"]
    result = tune_run(*COMMANDS[recipe], *overrides, recipe=recipe)
    assert result.returncode == 0, result.stderr
    assert of_libraries(result.stderr) == []
    assert "warn" not in result.stdout.lower()
