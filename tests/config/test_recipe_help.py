"""`--help` of every recipe: all keys with type, default and effect, in 80 columns, without importing torch."""

import re

import pytest
import yaml

from custom_components.config.checks import known_annotations
from custom_components.config.recipe_files import config_named_in, docstring
from custom_components.config.recipe_help import recipe_help, settings_type_of, written_keys
from custom_components.config.signatures import parameters_in_source
from custom_components.config.task_settings import MergeSettings
from custom_components.config.type_words import type_words
from tests.support.paths import PROJECT
from tests.support.tune_process import python_process, write_tune

RECIPES = sorted(PROJECT.glob("recipes/[!_]*.py"))
CONFIGS = sorted(PROJECT.glob("configs/*.yaml"))


def help_of(recipe):
    settings_type = settings_type_of(recipe)
    config = PROJECT / config_named_in(docstring(recipe))
    return settings_type, config, recipe_help(docstring(recipe), settings_type, config)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_key_is_listed_with_type_default_and_effect_in_80_columns(recipe):
    settings_type, config, text = help_of(recipe)
    assert all(len(line) <= 80 for line in text.splitlines())
    joined = re.sub(r"\s+", " ", text)
    entries = {match[1]: match[0] for match in re.finditer(r"^  ([\w.]+)  .*(?:\n      .*)*", text, re.MULTILINE)}
    for name, field in settings_type.model_fields.items():
        words = re.sub(r"\s+", " ", entries[name])
        assert type_words(field.annotation, field.metadata) in words
        if not field.is_required():
            default = field.get_default()
            spelled = (
                {None: "null", True: "true", False: "false", "": '""'}.get(default)
                if not isinstance(default, list)
                else "[]"
            )
            assert f"default {default if spelled is None or type(default) in (int, float) else spelled}" in words
    written = yaml.safe_load(config.read_text())
    also = set(re.findall(r"[\w.]+", " ".join(re.findall(r"also: ((?:.|\n      )*)", text))))
    for key in known_annotations(settings_type, written):
        node, _, name = key.partition(".")
        is_passed_on = name and re.fullmatch(r"\$\{.*\}", str((written.get(node) or {}).get(name)))
        assert key in entries or key in also or is_passed_on or name in ("self", "kwargs"), key
    for key, written_key in written_keys(config.read_text()).items():
        assert re.sub(r"\s+", " ", written_key.effect) in joined, key


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_the_comment_of_every_key_is_read(config):
    """By another way than the help's: the text after the last # of the key's line."""
    keys = written_keys(config.read_text())
    for line in config.read_text().splitlines():
        if match := re.match(r"(\w+):.*?\s# (.*)$", line):
            assert keys[match[1]].effect.startswith(match[2]), line


def test_comments_are_told_from_values():
    keys = written_keys(
        "# ---- Text ----\n"
        "a: 'x # y'  # of a\n"
        "b:          # of b\n"
        "            # and more\n"
        "  c: [1, 2] # of c\n"
        "  # a remark\n"
        "# ---- Numbers\n"
        "d: 1\n"
        "e:        # of e\n"
        "  - one\n"
        "  - two\n"
    )
    assert {key: (value.section, value.value, value.effect) for key, value in keys.items()} == {
        "a": ("Text", "'x # y'", "of a"),
        "b": ("Text", None, "of b and more"),
        "b.c": ("Text", "[1, 2]", "of c"),
        "d": ("Numbers", "1", ""),
        "e": ("Numbers", "- one\n  - two", "of e"),
    }


@pytest.mark.parametrize("text", ["", "- a\n", "a: [", "a"])
def test_what_is_not_a_config_has_no_keys(text):
    assert written_keys(text) == {}
    assert "output_dir" in recipe_help("Merge.", MergeSettings, None)


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("torch.optim.AdamW", {"lr": "number", "weight_decay": "number", "fused": "true or false or null"}),
        ("custom_components.models.lora_llama2_7b", {"lora_rank": "integer"}),
        ("custom_components.training.loss.LinearCrossEntropy", {"chunk_size": "integer"}),
        ("custom_components.datasets.chat_dataset", {"max_rows": "integer or null", "split": "text"}),
        ("nothing.there", {}),
        ("", {}),
        ("torch.optim.Nothing", {}),
    ],
)
def test_parameters_are_read_from_source(path, parameters):
    found = {parameter.name: parameter for parameter in parameters_in_source(path)}
    assert found.keys() >= parameters.keys() and bool(found) == bool(parameters)
    assert "shape" not in found and "self" not in found
    for name, words in parameters.items():
        assert set(type_words(found[name].annotation).replace(",", " or").split(" or ")) == set(words.split(" or "))


def test_parameters_in_source_are_those_of_the_signature():
    import inspect

    from custom_components.config.components import component

    for path in (
        "torch.optim.AdamW",
        "custom_components.models.lora_llama2_7b",
        "custom_components.datasets.chat_dataset",
    ):
        assert [p.name for p in parameters_in_source(path)] == list(inspect.signature(component(path)).parameters)


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("options", [[], ["--config", "configs/tiny_qlora.yaml"]])
def test_help_comes_before_torch_is_imported(tmp_path, flag, options):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise AssertionError('imported')")
    arguments = ["run", "recipes/lora_single_device.py", *options, flag]
    result = python_process(write_tune(tmp_path), *arguments, first_path=tmp_path)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert "lora_rank  integer > 0; here 16" in result.stdout
    assert (options[1] if options else "configs/llama2_7b_qlora.yaml") in result.stdout


RECIPE = '''"""Do something of one's own.

tune run mine.py --config configs/tiny_qlora.yaml
"""
import sys
from custom_components.config.reading import load_settings
from custom_components.config.settings import Settings

class MySettings(Settings):
    """What it reads."""
    lora_rank: int
    temper: float = 0.5

load_settings(MySettings, sys.argv[1:])
raise AssertionError
'''


def test_a_recipe_with_settings_of_its_own_shows_them(tmp_path):
    (tmp_path / "mine.py").write_text(RECIPE)
    result = python_process(tmp_path / "mine.py", "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Do something of one's own.")
    assert "  temper  number; default 0.5\n" in result.stdout
    assert "lora_rank  integer; here 16\n      more: more capacity" in result.stdout
    result = python_process(write_tune(tmp_path), "run", "mine.py", "--help", directory=tmp_path)
    assert result.returncode == 0 and "  temper  number; default 0.5\n" in result.stdout, result.stderr
