"""Everything works without a network (L28), executes no file and writes only where it is told (L29)."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from custom_components.datasets.token_cache import TokenCache
from custom_components.runs.resuming import open_run_to_resume
from custom_components.runtime.errors import UserError
from custom_components.training.state import Progress
from custom_components.transforms.prompt_format import PromptFormat, read_prompt_format
from custom_components.weights.adapters import save_adapter
from tests.support.adapters import WEIGHTS
from tests.support.checkpoints import as_meta_checkpoint, split_into_shards
from tests.support.models import inference_model, loaded_model
from tests.support.paths import PROJECT
from tests.support.recipe_runs import arguments

# Refuses the network and notes every path that is written, then runs recipes, which share the imports.
WATCHED_RUN = """
import json, os, runpy, sys

journal = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostby", "socket.sendto", "socket.sendmsg", "socket.bind")
# Where in the event's arguments each path stands, and the descriptor of the directory that it is relative to.
PATHS = {
    "os.mkdir": [(0, 2)], "os.rename": [(0, 2), (1, 3)], "os.remove": [(0, 1)], "os.rmdir": [(0, 1)],
    "os.symlink": [(1, 2)], "os.link": [(1, 3)], "os.truncate": [(0, None)], "os.chmod": [(0, 2)],
    "os.utime": [(0, 3)], "shutil.move": [(1, None)], "shutil.copyfile": [(1, None)],
}

def note(what, path, folder=None):
    if isinstance(path, int):
        return
    folder = os.readlink(f"/proc/self/fd/{folder}") if folder is not None and folder >= 0 else os.getcwd()
    os.write(journal, (json.dumps([what, os.path.join(folder, os.fsdecode(path))]) + "\\n").encode())

def watch(event, arguments):
    if event.startswith(NETWORK):
        note("network", str(arguments[1:]))
        raise OSError(f"no network: {event}")
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
        note(event, arguments[0])
    for path, folder in PATHS.get(event, []):
        note(event, arguments[path], None if folder is None else arguments[folder])

sys.addaudithook(watch)
for sys.argv in json.loads(sys.argv[2]):
    note("begun", sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def watched(tmp_path):
    """A function that runs recipes as a user without a network would, and returns what each touched."""
    folders = {name: tmp_path / name for name in ("home", "temporary", "elsewhere")}
    for folder in folders.values():
        folder.mkdir()
    environment = {
        **{name: value for name, value in os.environ.items() if name.startswith(("OMP_", "GOMP_", "PATH"))},
        **{"HOME": str(folders["home"]), "TMPDIR": str(folders["temporary"]), "PYTHONDONTWRITEBYTECODE": "1"},
        "PYTHONPATH": str(PROJECT),
    }

    def run(*commands):
        journal = tmp_path / "journal"
        arguments = [[str(PROJECT / command[0]), *command[1:]] for command in commands]
        result = subprocess.run(
            [sys.executable, "-c", WATCHED_RUN, journal, json.dumps(arguments)],
            cwd=folders["elsewhere"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        events = [json.loads(line) for line in journal.read_text().splitlines()]
        begins = [index for index, (what, _) in enumerate(events) if what == "begun"]
        # note: what compiled code writes, torch.save and safetensors among it, raises no event.
        found = [["found", str(file)] for name in ("home", "elsewhere") for file in folders[name].rglob("*")]
        return [events[begin + 1 : end] + found for begin, end in zip(begins, [*begins[1:], len(events)], strict=True)]

    return run


def test_L28_L29_without_network_everything_works_and_writes_only_where_it_is_told(
    make_checkpoint,
    rows,
    tmp_path,
    watched,
):
    checkpoint, output_dir, cache_dir = make_checkpoint(), tmp_path / "run", tmp_path / "cache"
    # What is written whole or not at all is written beside its place first.
    merged, results = tmp_path / "merged", tmp_path / "results"
    training = arguments(checkpoint, rows, output_dir, "sample_prompts=['Who?']", "val_fraction=0.4")
    cached = f"cache_dir={cache_dir}"
    adapter = [f"checkpoint_dir={checkpoint}", f"adapter_dir={output_dir}/adapter"]
    runs = {
        "lora_single_device": ([*training[1:], cached], [output_dir, cache_dir]),
        "full_single_device": (
            [
                *("configs/tiny_full.yaml", f"checkpoint_dir={checkpoint}", f"output_dir={tmp_path / 'full'}", cached),
                *(f"dataset.source={rows}", "val_fraction=0.4", "device=cpu", "max_steps=2"),
            ],
            [tmp_path / "full", cache_dir],
        ),
        "preview": ([*training[1:], cached, f"output_file={results}/rows.html"], [results, cache_dir]),
        "generate": (["configs/generate.yaml", *adapter, "prompt=Who?", "max_new_tokens=5", "device=cpu"], []),
        "evaluate": (
            [
                *("configs/evaluate.yaml", *adapter, f"dataset.source={rows}", cached, "device=cpu"),
                f"output_file={results}/results.json",
            ],
            [results, cache_dir],
        ),
        "merge": (["configs/merge.yaml", *adapter, f"output_dir={merged}/model"], [merged]),
        "compare_runs": (
            [
                *("configs/compare_runs.yaml", f"run_dirs=[{output_dir}, {tmp_path / 'full'}]"),
                f"output_file={results}/report.html",
            ],
            [results],
        ),
    }
    commands = [
        [f"recipes/{name}.py", "--config", str(PROJECT / config), *rest] for name, ([config, *rest], _) in runs.items()
    ]
    journals = watched(*commands)
    for name, (_, folders), events in zip(runs, runs.values(), journals, strict=True):
        allowed = (*folders, tmp_path / "temporary", "/dev")
        outside = [event for event in events if not any(Path(event[1]).is_relative_to(folder) for folder in allowed)]
        assert outside == [], name
    trained = journals[0]
    written = {path for what, path in trained if what == "open"}
    assert str(output_dir / "metrics.jsonl") in written and any(path.startswith(str(cache_dir)) for path in written)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def pickled(file):
    file.write_bytes(pickle.dumps({"lm_head.weight": Malicious()}))


def zipped(file):
    torch.save({"lm_head.weight": Malicious()}, file)


@pytest.fixture(params=[pickled, zipped])
def poison(request, tmp_path, monkeypatch):
    """Writes a file that makes a directory when it is unpickled, which is looked for afterwards."""
    monkeypatch.chdir(tmp_path)
    yield request.param
    assert not (tmp_path / "executed").exists()


def test_L29_the_poison_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Malicious()))  # noqa: S301
    assert (tmp_path / "executed").exists()


def test_L29_a_checkpoint_s_pickles_are_not_executed(make_checkpoint, poison):
    checkpoint = make_checkpoint()
    split_into_shards(checkpoint, "bin")
    for file in checkpoint.glob("*.bin"):
        poison(file)
    with pytest.raises(UserError, match="not a whole file of plain tensors"):
        loaded_model(checkpoint)
    checkpoint = make_checkpoint("meta", intermediate_size=256)
    as_meta_checkpoint(checkpoint, 2)
    poison(checkpoint / "consolidated.01.pth")
    with pytest.raises(UserError, match="not a whole file of plain tensors"):
        loaded_model(checkpoint)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_0.pt"])
def test_L29_an_adapter_s_pickles_are_not_executed(make_checkpoint, tmp_path, poison, name):
    checkpoint = make_checkpoint()
    adapter = tmp_path / "adapter"
    save_adapter(loaded_model(checkpoint), adapter, "a/base", PromptFormat("llama2", None, ["</s>"]).texts())
    (adapter / WEIGHTS).unlink()
    poison(adapter / name)
    with pytest.raises(UserError, match="not a whole file of plain tensors"):
        inference_model(checkpoint, adapter)


def test_L29_a_run_s_checkpoint_is_not_executed(tmp_path, poison):
    step = tmp_path / "run/checkpoints/step_000001"
    step.mkdir(parents=True)
    poison(step / "state.pt")
    for resume in (True, str(step)):
        with pytest.raises(UserError, match="whole checkpoint"):
            open_run_to_resume(resume, tmp_path / "run")


def test_L29_cached_tokens_are_not_executed(rows, tmp_path, poison):
    cache = TokenCache(tmp_path / "cache", [rows], [])
    cache.store({"tokens": np.arange(5)}, {"rows": 1})
    [file] = (tmp_path / "cache").rglob("tokens.npy")
    assert cache.load() is not None
    np.save(file, np.array([Malicious()], dtype=object), allow_pickle=True)
    assert cache.load() is None
    poison(file)
    assert cache.load() is None


def test_L29_yaml_is_not_executed(make_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "!!python/object/apply:os.mkdir [executed]"
    (tmp_path / "prompt_format.yaml").write_text(text)
    with pytest.raises(UserError, match="not a prompt format"):
        read_prompt_format(tmp_path)
    step = tmp_path / "step_000001"
    step.mkdir()
    optimizer = {"state": {}, "param_groups": []}
    state = {"optimizer": optimizer, "scaler": {}, "data_digest": "", "best_adapter": {}}
    torch.save(state | {"progress": vars(Progress(num_steps=1))}, step / "state.pt")
    (step / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="cannot be read"):
        open_run_to_resume(str(step), tmp_path)
    assert not (tmp_path / "executed").exists()
    yaml.unsafe_load(text)
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("outside", ["../other/{}", "{folder}/other/{}", "shards/../../other/{}"])
def test_L29_an_index_that_names_a_shard_elsewhere_is_refused(make_checkpoint, tmp_path, suffix, outside):
    other, checkpoint = make_checkpoint("other"), make_checkpoint()
    (checkpoint / "shards").mkdir()
    for directory in (other, checkpoint):
        split_into_shards(directory, suffix)
    [index] = checkpoint.glob("*.index.json")
    weight_map = json.loads(index.read_text())["weight_map"]
    name = outside.format(sorted(weight_map.values())[0], folder=tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map | {"lm_head.weight": name}}))
    assert (checkpoint / name).is_file()
    with pytest.raises(UserError, match="which is not in its own directory") as error:
        loaded_model(checkpoint)
    assert repr(name) in str(error.value)
