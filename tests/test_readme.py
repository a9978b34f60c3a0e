"""The README's commands run as they are written, and what it names is there."""

import re
import shlex

import pytest

from custom_components.transforms.prompt_format import PromptFormat
from custom_components.weights.adapters import save_adapter
from tests.support.forked_tune import ForkedTune
from tests.support.models import loaded_model, with_random_adapters
from tests.support.paths import PROJECT, TINY_LLAMA

README = (PROJECT / "README.md").read_text()
COMMANDS = [
    " ".join(line.replace("\\\n", " ").split())
    for block in re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    for line in re.findall(r"^ *(tune run (?:.*\\\n)*.*)$", block, re.MULTILINE)
]
# What a test cannot have: the real weights and the reader's own file. Later overrides win over those of the command.
IN_PLACE_OF_7B = [
    "dtype=fp32",
    *(f"model.checkpoint_dir={TINY_LLAMA}/checkpoint", f"dataset.source={TINY_LLAMA}/data/train.jsonl"),
    *("max_steps_per_epoch=1", "device=cpu", "cache_dir=null"),
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter on the tiny model, in the place of the one that the README's first command trains."""
    directory = tmp_path_factory.mktemp("readme") / "adapter"
    model = with_random_adapters(loaded_model(TINY_LLAMA / "checkpoint"))
    save_adapter(model, directory, "tiny", PromptFormat("llama2", None, ["</s>"]).texts())
    return directory


def in_place(command, adapter, tmp_path):
    """Overrides that bring a command to the tiny model, and what it reads from standard input."""
    recipe = command.split()[2].removeprefix("recipes/").removesuffix(".py")
    overrides = [f"checkpoint_dir={TINY_LLAMA}/checkpoint"]
    if recipe in ("generate", "evaluate", "merge"):
        overrides += [f"adapter_dir={adapter}"]
    if recipe == "generate":
        overrides += ["max_new_tokens=5", "device=cpu"]
        if "prompts_file" in command:
            (tmp_path / "questions.jsonl").write_text('{"prompt": "Who are you?"}\n')
            overrides += [f"prompts_file={tmp_path / 'questions.jsonl'}", f"output_file={tmp_path / 'answers.jsonl'}"]
    elif recipe == "evaluate":
        overrides += [f"dataset.source={TINY_LLAMA}/data/val.jsonl", f"output_file={tmp_path / 'results.json'}"]
        overrides += ["dataset.max_rows=8", "device=cpu", "cache_dir=null"]
    elif recipe == "merge":
        overrides += [f"output_dir={tmp_path / 'merged'}"]
    else:
        if recipe == "full_single_device":
            # note: compiling the config's optimizer takes a minute.
            overrides += ["optimizer={_component_: torch.optim.AdamW, lr: 2e-5}"]
        builder = "llama_from_config" if recipe == "full_single_device" else "lora_llama_from_config"
        overrides += [f"model._component_=custom_components.models.{builder}"]
        overrides += [*IN_PLACE_OF_7B, f"output_dir={tmp_path / 'out'}"]
        overrides += [f"output_file={tmp_path / 'rows.html'}"] if recipe == "preview" else []
    return overrides


def test_the_commands_are_found():
    recipes = {path.stem for path in (PROJECT / "recipes").glob("*.py")} - {"__init__"}
    assert {command.split()[2] for command in COMMANDS} == {f"recipes/{recipe}.py" for recipe in recipes}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_as_written(command, adapter, tmp_path):
    arguments = [*shlex.split(command)[1:], *in_place(command, adapter, tmp_path)]
    result = ForkedTune(*arguments, input="Hello\n").result()
    assert result.returncode == 0, result.stderr


def test_what_the_tree_and_the_table_name_is_there():
    names = set(re.findall(r"[\w/*]+\.(?:py|yaml)\b", README)) - {
        "prompt_format.yaml",
        "config.yaml",
        "recipes/my_lora.py",
    }
    assert len(names) > 12
    for name in names:
        assert any(PROJECT.rglob(name)), name


def test_no_figure_is_left_to_fill_in():
    assert not re.search(r"\b[A-Z0-9]+_[A-Z_]+\b", README.replace("GOMP_SPINCOUNT", "").replace("PIP_INSTALL_ARGS", ""))
