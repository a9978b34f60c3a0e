"""L26: whatever a config says, it is read right or refused; never a traceback, never a key passed over in silence."""

import string
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from custom_components.config.component_checks import known_annotations
from custom_components.config.full_settings import FullSettings
from custom_components.config.lora_settings import LoRASettings
from custom_components.config.preference_settings import PreferenceSettings
from custom_components.config.reading import load_settings
from custom_components.config.settings import Settings
from custom_components.config.task_settings import GenerationSettings
from custom_components.runtime.errors import UserError
from tests.support.paths import PROJECT


class Config(NamedTuple):
    """A config, what it has, the keys that it can have, and their settings."""

    path: Path
    values: dict[str, Any]
    known_keys: list[str]
    settings: type[Settings]


def config_of(name, settings_type):
    path = PROJECT / f"configs/{name}.yaml"
    values = yaml.safe_load(path.read_text())
    return Config(path, values, sorted(known_annotations(settings_type, values)), settings_type)


CONFIGS = {
    name: config_of(name, settings_type)
    for name, settings_type in (
        ("tiny_qlora", LoRASettings),
        ("tiny_full", FullSettings),
        ("tiny_dpo", PreferenceSettings),
    )
}
# Each example is of one of them, drawn.
configs = st.sampled_from(sorted(CONFIGS)).map(CONFIGS.__getitem__)
TINY = CONFIGS["tiny_qlora"].path
names = st.text(string.ascii_lowercase + "_", min_size=1, max_size=12)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=6
)
FUZZ = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(PROJECT)


def load(config, *overrides, settings_type=LoRASettings):
    return load_settings(settings_type, ["--config", str(config), *overrides])


@FUZZ
@given(configs, st.data())
def test_L26_any_values_of_any_keys(tmp_path, of_recipe, data):
    """Known and unknown keys with random values, in the file."""
    changes = data.draw(st.dictionaries(st.sampled_from(of_recipe.known_keys) | names, values, max_size=4))
    config = dict(of_recipe.values)
    for key, value in changes.items():
        parent, _, name = key.partition(".")
        if name and isinstance(config.get(parent), dict):
            config[parent] = {**config[parent], name: value}
        elif not name:
            config[parent] = value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    unknown = [key for key in config if key not in of_recipe.settings.model_fields]
    try:
        load(tmp_path / "config.yaml", settings_type=of_recipe.settings)
    except UserError as error:
        if any(": a secret would be copied" in message for message in error.messages):
            return  # it is named alone, for other messages show values
        assert all(any(message.startswith(f"{key}: ") for message in error.messages) for key in unknown)
    else:
        assert not unknown


@FUZZ
@given(configs, st.data())
def test_L26_any_overrides(of_recipe, data):
    known = st.builds("{}={}".format, st.sampled_from(of_recipe.known_keys), st.text(max_size=12))
    overrides = data.draw(st.lists(st.text(max_size=20) | known))
    try:
        load(of_recipe.path, *overrides, settings_type=of_recipe.settings)
    except UserError:
        return
    for override in overrides:
        key, equals, _ = override.removeprefix("~").partition("=")
        assert key in of_recipe.known_keys or key.partition(".")[0] in of_recipe.values, override
        assert equals or override.startswith("~")


@FUZZ
@given(st.binary(max_size=60))
def test_L26_any_bytes_as_a_file(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError):
        load(tmp_path / "config.yaml")


@pytest.mark.parametrize("content", ["?", "1: 2", "on: 1", "!!binary YQ==: 1", "model: {~: 1}", "a: 1"])
def test_L26_keys_that_are_no_names_and_configs_of_almost_nothing(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError) as error:
        load(tmp_path / "config.yaml")
    assert "unknown key" in str(error.value) or "model._component_: missing" in str(error.value)


def test_L26_a_key_left_out_has_its_default():
    assert load(TINY, "~cache_dir").cache_dir == load(TINY).cache_dir


@FUZZ
@given(configs, names, st.sampled_from(["", "model.", "optimizer.", "loss."]))
def test_L26_an_unknown_key_at_any_depth_is_an_error(of_recipe, name, prefix):
    if name in of_recipe.settings.model_fields or f"{prefix}{name}" in of_recipe.known_keys or name == "_component_":
        return
    with pytest.raises(UserError) as error:
        load(of_recipe.path, f"{prefix}{name}=1", settings_type=of_recipe.settings)
    assert f"{prefix}{name}: " in str(error.value)


@FUZZ
@given(st.text())
def test_L26_any_text_is_a_prompt(text):
    arguments = ["--config", "configs/generate.yaml", f"prompt={text}"]
    assert load_settings(GenerationSettings, arguments).prompt == text
