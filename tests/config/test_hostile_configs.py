"""Configs that would hang, crash or give a secret away: one error line each, and texts that stay as they are."""

import json
import os
import time

import pytest

from custom_components.config.reading import load_settings
from custom_components.config.task_settings import GenerationSettings
from custom_components.runtime.errors import UserError

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 12)
)
MERGED_LAUGHS = "a0: &a0 {x: 1}\n" + "".join(
    f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 9)}]}}\n" for level in range(1, 12)
)
GROWING = f"a0: {'x' * 1000}\n" + "".join(f"a{level}: {f'${{a{level - 1}}}' * 10}\n" for level in range(1, 12))


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_the_secret")
    monkeypatch.setenv("SCRATCH", "/scratch/me")


@pytest.fixture
def load(tmp_path):
    def load(text, *overrides):
        (tmp_path / "config.yaml").write_text(f"checkpoint_dir: a\n{text}\n", encoding="utf-8", errors="surrogatepass")
        return load_settings(GenerationSettings, ["--config", str(tmp_path / "config.yaml"), *overrides])

    return load


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch_size: '${5'", "batch_size: '${5' is not a whole reference"),
        ("system_prompt: '${5}'", "system_prompt: Interpolation key '5' not found"),
        ("system_prompt: ${system_prompt}", "system_prompt: Recursive interpolation"),
        ("system_prompt: ${a${prompt}}", "system_prompt: has a reference in a reference"),
        ("system_prompt: !!set {a, b}", "line 2 is marked as !!set"),
        ("system_prompt: !!timestamp 2020-01-01", "line 2 is marked as !!timestamp"),
        ("system_prompt: !!binary aGk=", "line 2 is marked as !!binary"),
        ("system_prompt: !!python/name:os.system ''", "line 2 is marked as !!python/name:os.system"),
        (r'system_prompt: "\ud83d"', "line 2 has half of a character"),
        (f"seed: {'9' * 4300}", "line 2 has a number of 4300 digits"),
        (f"seed: 0x{'f' * 5000}", "line 2 has a number of 5002 digits"),
        (f"seed: {'[' * 200}{']' * 200}", "line 2 is nested more than 50 levels deep"),
        (f"seed: {'[' * 1000}", "nested too deeply"),
        ("seed: &a [*a]", "line 2 refers to what it is in"),
        ("seed: &a {b: *a}", "line 2 refers to what it is in"),
        (LAUGHS, "stands for more than 50000 values"),
        (MERGED_LAUGHS, "stands for more than 50000 values"),
        (GROWING, "refers to more than a config can hold"),
        ("? [a]\n: b", "has a key that is not a text"),
        ("x" * 2**20, "more than such a file has"),
        ("max_new_tokens: 1000000000000000000000000000000", "max_new_tokens: 10000"),
        ("temperature: .inf", "temperature: inf should be a finite number"),
        ("temperature: .nan", "temperature: nan should be"),
        (f"batch_size: {'x' * 10_000}", "batch_size: 'xxxx"),
    ],
    ids=lambda text: text[:30],
)
def test_what_no_config_can_be_is_one_short_error_and_no_wait(load, text, words):
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        load(text)
    assert words in str(error.value)
    assert time.monotonic() - start < 5
    for message in error.value.messages:
        assert "\n" not in message and len(message) < 500


@pytest.mark.parametrize(
    "text", ["Costs ${5", "${", "a ${prompt} b", r"\${x} \\${y}", "5" * 5000, "{a: [", "!!set {a}", "*a"]
)
def test_a_text_on_the_command_line_stays_as_it_is(load, text):
    settings = load("", f"system_prompt={text}")
    assert settings.system_prompt == text


def test_an_unfinished_reference_in_a_text_is_text(load):
    settings = load(r"""
system_prompt: 'Costs ${5'
prompt: 'as \${seed}, ${batch_size}'
batch_size: 3""")
    assert (settings.system_prompt, settings.prompt) == ("Costs ${5", "as ${seed}, 3")


def test_only_paths_refer_to_the_environment(load):
    assert str(load("output_file: ${oc.env:SCRATCH}/a\nprompts_file: b").output_file) == "/scratch/me/a"
    assert str(load("output_file: ${oc.env:NOTHING,c}/a\nprompts_file: b").output_file) == "c/a"
    for text, words in (
        ("system_prompt: ${oc.env:SCRATCH}", "give it on the command line as key=$SCRATCH"),
        ("system_prompt: a ${oc.env:SCRATCH}", "give it on the command line as key=$SCRATCH"),
        ("output_file: ${oc.env:HF_TOKEN}", "${oc.env:HF_TOKEN} is a secret by its name"),
        ("output_file: ${oc.env:NOTHING}", "Environment variable 'NOTHING' not found"),
        ("system_prompt: ${oc.decode:${oc.env:HF_TOKEN}}", "a reference in a reference"),
    ):
        with pytest.raises(UserError) as error:
            load(text)
        assert words in str(error.value) and os.environ["HF_TOKEN"] not in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        "hf_token=hf_the_secret",
        "metric_logger.api_key=hf_the_secret",
        "adapter_dir=https://me:hf_the_secret@host.example/a",
        "--token=hf_the_secret",
    ],
)
def test_secrets_are_refused_and_not_shown(load, override):
    with pytest.raises(UserError) as error:
        load("", override)
    assert "hf_the_secret" not in str(error.value)


def test_an_error_is_one_line_whatever_is_in_it():
    error = UserError("a\nb \x1b[2J" + json.dumps("c"))
    assert error.messages == (r'a b \x1b[2J"c"',)
