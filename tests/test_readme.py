"""The README's commands run as they are written, and what it names is there."""

import os
import re
import shlex
import subprocess

import pytest

from tests.conftest import PROJECT, TINY_LLAMA
from tests.test_lora_single_device import TUNE

README = (PROJECT / "README.md").read_text()
COMMANDS = [
    " ".join(line.replace("\\\n", " ").split())
    for block in re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    for line in re.findall(r"^ *(tune run (?:.*\\\n)*.*)$", block, re.MULTILINE)
]
# What a test cannot have: the real weights and the reader's own file. Later overrides win over those of the command.
IN_PLACE_OF_7B = [
    *("model._component_=custom_components.builders.lora_llama_from_config", "dtype=fp32"),
    *(f"model.checkpoint_dir={TINY_LLAMA}/checkpoint", f"dataset.source={TINY_LLAMA}/data/train.jsonl"),
    *("max_steps_per_epoch=1", "device=cpu", "cache_dir=null"),
]


def test_the_commands_are_found():
    assert len(COMMANDS) >= 4
    assert {command.split()[2] for command in COMMANDS} == {
        *("recipes/lora_single_device.py", "recipes/generate.py", "recipes/preview.py"),
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_as_written(command, tmp_path):
    overrides = [f"checkpoint_dir={TINY_LLAMA}/checkpoint"]
    if "generate.py" in command:
        overrides += ["adapter_dir=null", "compare=false", "max_new_tokens=5"]
    else:
        overrides += [*IN_PLACE_OF_7B, f"output_dir={tmp_path / 'out'}"]
    arguments = [str(TUNE), *shlex.split(command)[1:], *overrides]
    result = subprocess.run(arguments, cwd=PROJECT, capture_output=True, text=True, timeout=200, env=dict(os.environ))
    assert result.returncode == 0, result.stderr


def test_what_the_tree_and_the_table_name_is_there():
    names = set(re.findall(r"[\w/*]+\.(?:py|yaml)\b", README)) - {"prompt_format.yaml", "config.yaml"}
    assert len(names) > 20
    for name in names:
        assert any(PROJECT.rglob(name)), name


def test_no_figure_is_left_to_fill_in():
    assert not re.search(r"\b[A-Z0-9]+_[A-Z_]+\b", README.replace("GOMP_SPINCOUNT", "").replace("PIP_INSTALL_ARGS", ""))
