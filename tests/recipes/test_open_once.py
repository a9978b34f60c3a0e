"""What a recipe reads is opened once and handed on: a checkpoint, an adapter, a run to resume."""

import builtins
import io
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from custom_components.weights import checkpoint_files
from recipes import evaluate, generate, lora_single_device, merge
from tests.support.adapters import saved_adapter
from tests.support.models import loaded_model, with_random_adapters
from tests.support.paths import PROJECT
from tests.support.recipe_runs import arguments

TENSOR_FILES = (".safetensors", ".pt", ".pth", ".bin")


class Openings:
    """Runs recipes in this process, and counts how often the last one opened each file."""

    def __init__(self, monkeypatch):
        self.counts = Counter()
        self._monkeypatch = monkeypatch
        open_text = self._counted(open, lambda file: not file.endswith(TENSOR_FILES))
        for module in (builtins, io):  # pathlib takes it from io
            monkeypatch.setattr(module, "open", open_text)
        monkeypatch.setattr(checkpoint_files, "safe_open", self._counted(checkpoint_files.safe_open))
        monkeypatch.setattr(torch, "load", self._counted(torch.load))
        monkeypatch.chdir(PROJECT)

    def _counted(self, open_file, is_counted=lambda file: True):
        def open_counted(file, *args, **kwargs):
            self.counts[str(file)] += is_counted(str(file))
            return open_file(file, *args, **kwargs)

        return open_counted

    def run(self, recipe, *overrides):
        self._monkeypatch.setattr(sys, "argv", ["recipe", *overrides])
        self.counts.clear()
        recipe.recipe_main()

    def of(self, directory):
        """Those of the files in a directory, by their names."""
        return {
            Path(path).name: number
            for path, number in self.counts.items()
            # The tokenizer is opened by the transform, whose parts read it apart.
            if number and Path(path).parent == directory and Path(path).name != "tokenizer.model"
        }


@pytest.fixture
def openings(monkeypatch):
    return Openings(monkeypatch)


@pytest.fixture
def checkpoint(make_checkpoint):
    """A base with what `tune download` leaves beside the weights."""
    directory = make_checkpoint()
    (directory / "original_repo_id.json").write_text(json.dumps({"repo_id": "a/base"}))
    (directory / "README.md").write_text("---\nlicense: llama2\n---\n")
    return directory


@pytest.mark.parametrize("names_its_repository", [True, False])
def test_a_training_run_opens_its_base_once(openings, checkpoint, rows, tmp_path, names_its_repository):
    if not names_its_repository:
        (checkpoint / "original_repo_id.json").unlink()
    openings.run(lora_single_device, *arguments(checkpoint, rows, tmp_path / "out"))
    of_hub = {"original_repo_id.json": 1} if names_its_repository else {}
    assert openings.of(checkpoint) == {
        "config.json": 2,  # the builder that the config's model node names reads the shape for itself
        "model.safetensors": 1,
        "README.md": 1,
        **of_hub,
    }


def test_a_run_to_resume_is_opened_once(openings, checkpoint, rows, tmp_path):
    command = arguments(checkpoint, rows, tmp_path / "out", "optimizer.lr=0.001")
    openings.run(lora_single_device, *command, "epochs=1")
    openings.run(lora_single_device, *command, "epochs=2", "resume_from_checkpoint=true")
    step = tmp_path / "out/checkpoints/step_000002"
    # The texts say whose the files are, before anything could be deleted and once more under the lock.
    assert openings.of(step)["state.pt"] == 1
    # Before anything is loaded its header is read, to pass over a checkpoint that cannot be gone on from.
    assert openings.of(step / "adapter")["adapter_model.safetensors"] == 2


def test_an_adapter_to_begin_with_is_opened_once(openings, checkpoint, rows, tmp_path):
    lora = {"lora_rank": 16, "lora_alpha": 32}
    adapter = saved_adapter(with_random_adapters(loaded_model(checkpoint, **lora)), tmp_path / "adapter")
    command = arguments(checkpoint, rows, tmp_path / "out", f"init_adapter_from={adapter}")
    openings.run(lora_single_device, *command)
    assert openings.of(adapter) == {"adapter_config.json": 1, "adapter_model.safetensors": 1}


@pytest.mark.parametrize("verb", ["generate", "evaluate"])
def test_inference_opens_base_and_adapter_once(openings, checkpoint, rows, tmp_path, verb):
    adapter = saved_adapter(with_random_adapters(loaded_model(checkpoint)), tmp_path / "adapter")
    recipe, asked = {
        "generate": (generate, ["prompt=Who is it?", "max_new_tokens=2"]),
        "evaluate": (evaluate, [f"dataset.source={rows}", "cache_dir=null"]),
    }[verb]
    paths = [f"checkpoint_dir={checkpoint}", f"adapter_dir={adapter}"]
    openings.run(recipe, "--config", f"configs/{verb}.yaml", "device=cpu", *paths, *asked)
    assert openings.of(checkpoint) == {"config.json": 1, "model.safetensors": 1}
    assert openings.of(adapter) == {"prompt_format.yaml": 1, "adapter_config.json": 1, "adapter_model.safetensors": 1}


def test_a_merge_opens_base_and_adapter_once(openings, checkpoint, tmp_path):
    adapter = saved_adapter(with_random_adapters(loaded_model(checkpoint)), tmp_path / "adapter")
    paths = [f"checkpoint_dir={checkpoint}", f"adapter_dir={adapter}", f"output_dir={tmp_path / 'merged'}"]
    openings.run(merge, "--config", "configs/merge.yaml", *paths)
    of_base = openings.of(checkpoint)
    of_base.pop("config.json")  # the tokenizer that goes out with the model looks for padding there as well
    assert of_base == {"model.safetensors": 1, "original_repo_id.json": 1, "README.md": 1}
    of_adapter = openings.of(adapter)
    of_adapter.pop("README.md", None)
    assert of_adapter == {"prompt_format.yaml": 1, "adapter_config.json": 1, "adapter_model.safetensors": 1}
    assert openings.of(tmp_path) == {}  # no run's config.yaml is beside this adapter
