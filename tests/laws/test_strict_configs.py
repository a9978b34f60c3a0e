"""L26: whatever a config says, it is read right or refused; never a traceback, never a key passed over in silence."""

import string

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from custom_components.config.component_checks import known_annotations
from custom_components.config.lora_settings import LoRASettings
from custom_components.config.reading import load_settings
from custom_components.config.task_settings import GenerationSettings
from custom_components.runtime.errors import UserError
from tests.support.paths import PROJECT

TINY = PROJECT / "configs/tiny_qlora.yaml"
VALUES = yaml.safe_load(TINY.read_text())
KNOWN_KEYS = sorted(known_annotations(LoRASettings, VALUES))
names = st.text(string.ascii_lowercase + "_", min_size=1, max_size=12)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=6
)
FUZZ = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(PROJECT)


def load(config, *overrides):
    return load_settings(LoRASettings, ["--config", str(config), *overrides])


@FUZZ
@given(st.dictionaries(st.sampled_from(KNOWN_KEYS) | names, values, max_size=4))
def test_L26_any_values_of_any_keys(tmp_path, changes):
    """Known and unknown keys with random values, in the file."""
    config = dict(VALUES)
    for key, value in changes.items():
        parent, _, name = key.partition(".")
        if name and isinstance(config.get(parent), dict):
            config[parent] = {**config[parent], name: value}
        elif not name:
            config[parent] = value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    unknown = [key for key in config if key not in LoRASettings.model_fields]
    try:
        load(tmp_path / "config.yaml")
    except UserError as error:
        assert all(any(message.startswith(f"{key}: ") for message in error.messages) for key in unknown)
    else:
        assert not unknown


@FUZZ
@given(st.lists(st.text(max_size=20) | st.builds("{}={}".format, st.sampled_from(KNOWN_KEYS), st.text(max_size=12))))
def test_L26_any_overrides(overrides):
    try:
        load(TINY, *overrides)
    except UserError:
        return
    for override in overrides:
        key, equals, _ = override.removeprefix("~").partition("=")
        assert key in KNOWN_KEYS or key.partition(".")[0] in VALUES, override
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
@given(names.filter(lambda name: name not in LoRASettings.model_fields), st.sampled_from(["", "model.", "optimizer."]))
def test_L26_an_unknown_key_at_any_depth_is_an_error(name, prefix):
    if f"{prefix}{name}" in KNOWN_KEYS or name == "_component_":
        return
    with pytest.raises(UserError) as error:
        load(TINY, f"{prefix}{name}=1")
    assert f"{prefix}{name}: " in str(error.value)


@FUZZ
@given(st.text())
def test_L26_any_text_is_a_prompt(text):
    arguments = ["--config", "configs/generate.yaml", f"prompt={text}"]
    assert load_settings(GenerationSettings, arguments).prompt == text
