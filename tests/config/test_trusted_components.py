"""A config from a stranger runs no code but this project's, until the command names whose."""

import sys

import pytest

from custom_components.config.components import component, trust_packages
from custom_components.config.lora_settings import LoRASettings
from custom_components.config.reading import load_settings
from custom_components.runtime.errors import UserError
from tests.support.paths import PROJECT


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A module that leaves a file when it is imported."""
    (tmp_path / "stranger.py").write_text(
        f"open({str(tmp_path / 'imported')!r}, 'w').close()\n"
        "from custom_components.training.loss import LinearCrossEntropy as loss\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "imported"
    sys.modules.pop("stranger", None)
    trust_packages([])


def load(*arguments):
    return load_settings(LoRASettings, ["--config", str(PROJECT / "configs/tiny_qlora.yaml"), *arguments])


@pytest.mark.parametrize("override", ["loss._component_=stranger.loss", "loss={_component_: stranger.loss, lr: 1}"])
def test_nothing_is_imported_before_the_command_says_so(stranger, override):
    with pytest.raises(UserError) as error:
        load(override)
    [message] = error.value.messages
    assert "--trust-components stranger" in message and not stranger.exists()
    with pytest.raises(UserError):
        load(override, "--trust-components=strange")
    with pytest.raises(ImportError):
        component("stranger.loss")
    assert not stranger.exists()


@pytest.mark.parametrize("trust", [["--trust-components", "stranger"], ["--trust-components=stranger"]])
def test_a_trusted_package_is_used_and_for_one_command(stranger, trust):
    assert load("loss._component_=stranger.loss", *trust).loss["_component_"] == "stranger.loss"
    assert stranger.exists()
    with pytest.raises(UserError):
        load("loss._component_=stranger.loss")


@pytest.mark.parametrize(
    "node",
    [
        "loss={_component_: custom_components.runs.checkpoints.delete_checkpoints_after, run_path: a, step: 0}",
        "loss={_component_: custom_components.config.components.instantiate, node: {_component_: os.system}}",
        "dataset={_component_: custom_components.datasets.token_cache.whole_directory, path: a}",
        "tokenizer={_component_: custom_components.transforms.prompt_format.write_prompt_format, directory: a}",
        "loss={_component_: os.system, command: touch hit}",
        "dataset={_component_: torchtune.config.instantiate, config: {_component_: os.system, command: touch hit}}",
        "optimizer={_component_: subprocess.Popen, args: [touch, hit]}",
        "metric_logger={_component_: builtins.eval, source: 1}",
    ],
)
def test_other_functions_of_this_project_and_of_libraries_are_no_components(node, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load(node)
    assert any("._component_: " in message for message in error.value.messages)
    assert list(tmp_path.iterdir()) == []
