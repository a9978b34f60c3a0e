"""L30: a full disk is found before the first step or ends a run in one line, and destroys nothing whole."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from custom_components.runs import checkpoints
from custom_components.runs.run_directory import run_directory
from tests.support.adapters import saved_adapter
from tests.support.checkpoints import write_checkpoint
from tests.support.models import loaded_model, with_random_adapters
from tests.support.paths import PROJECT, snapshot
from tests.support.recipe_runs import arguments, full_arguments, run_here, run_merge
from tests.support.rows import random_dialogs, write_dialogs
from tests.support.written_runs import step_records, write_run

TIMING = ("step_seconds", "tokens_per_second", "peak_memory_gib")
BLOCK_BYTES = 4096  # of a tmpfs


@pytest.fixture
def disk(tmp_path):
    """A function that makes a disk of a size, or gives it another; skips where only root may."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def of_size(num_bytes: int) -> Path:
        options = f"{'remount,' if folder.is_mount() else ''}size={num_bytes}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a disk of its own size cannot be mounted ({error})")
        return folder

    yield of_size
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A base, an adapter on it, rows, and a run."""
    folder = tmp_path_factory.mktemp("inputs")
    base = write_checkpoint(folder / "base")
    write_dialogs(folder / "rows.jsonl", random_dialogs(12))
    saved_adapter(with_random_adapters(loaded_model(base)), folder / "adapter")
    write_run(folder / "run", records=step_records([3.0, 2.0]))
    return folder


def training(inputs: Path, output_dir: Path, *overrides: str) -> list[str]:
    steps = ["epochs=3", "max_steps_per_epoch=2", "save_every_n_steps=1", "val_fraction=0.2", "lora_dropout=0.1"]
    config, path, *rest = arguments(inputs / "base", inputs / "rows.jsonl", output_dir, *steps)
    return ["lora_single_device", config, str(PROJECT / path), *rest, *overrides]


def outcome(output_dir: Path) -> list:
    records = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(output_dir / "adapter/adapter_model.safetensors")
    return [
        [{key: value for key, value in record.items() if key not in TIMING} for record in records],
        {name: tensor.tolist() for name, tensor in weights.items()},
    ]


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("undisturbed") / "out"
    code, _, err = run_here(*training(inputs, output_dir))
    assert code == 0, err
    return output_dir


def size_on_disk(folder: Path) -> int:
    return sum(-(-path.stat().st_size // BLOCK_BYTES) * BLOCK_BYTES for path in folder.rglob("*") if path.is_file())


def assert_one_line(code: int, err: str, key: str) -> None:
    errors = [line for line in err.splitlines() if not line.startswith("step ")]
    assert code == 2 and len(errors) == 1, err
    assert errors[0].startswith(f"error: {key}: ") and "disk" in errors[0] and "free space there" in errors[0], err


@pytest.mark.parametrize(
    "share", [0.02, 0.3, 0.6, 0.8, 0.9, *(pytest.param(k / 20, marks=pytest.mark.slow) for k in range(1, 22))]
)
def test_L30_L35_a_run_on_a_disk_of_any_size(inputs, undisturbed, disk, share):
    """It ends in one line, and goes on to the same end when the disk is made larger."""
    num_bytes = size_on_disk(undisturbed)
    folder = disk(max(BLOCK_BYTES, int(share * num_bytes)))
    code, _, err = run_here(*training(inputs, folder / "out"))
    if code != 0:
        assert_one_line(code, err, "output_dir")
        saved = list((folder / "out/checkpoints").glob("step_*"))
        for path in saved:
            assert torch.load(path / "state.pt", weights_only=True)["progress"]["num_steps"] == int(path.name[5:])
        disk(3 * num_bytes)
        goes_on = "resume_from_checkpoint=true" if saved else "overwrite_output_dir=true"
        code, _, err = run_here(*training(inputs, folder / "out", goes_on))
        assert code == 0, err
    assert outcome(folder / "out") == outcome(undisturbed)


def test_L30_a_disk_without_room_for_a_checkpoint_is_found_before_anything_changes(inputs, undisturbed, disk):
    """The results of an earlier run are there until the new one can save."""
    folder = disk(size_on_disk(undisturbed) + 8 * BLOCK_BYTES)
    shutil.copytree(undisturbed, folder / "out")
    before = snapshot(folder)
    code, _, err = run_here(*training(inputs, folder / "out", "overwrite_output_dir=true"))
    assert_one_line(code, err, "output_dir")
    assert "a checkpoint of this run takes up to " in err and "step 1" not in err
    assert snapshot(folder) == before


def test_a_run_that_cannot_begin_leaves_no_directory(inputs, disk):
    folder = disk(16 * BLOCK_BYTES)
    code, _, err = run_here(*training(inputs, folder / "new" / "out"))
    assert_one_line(code, err, "output_dir")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("format", ["hugging_face", "gguf"])
@pytest.mark.parametrize("share", [0.1, 0.7, 0.99])
def test_L30_a_merge_on_a_full_disk(inputs, disk, tmp_path, monkeypatch, format, share):
    """Also where the space that was looked for is taken by others meanwhile."""
    if format == "gguf":
        pytest.importorskip("gguf")
    keys = {"checkpoint_dir": inputs / "base", "adapter_dir": inputs / "adapter", "prove": "false", "format": format}
    assert run_merge(**keys, output_dir=tmp_path / "merged")[0] == 0
    folder = disk(int(share * size_on_disk(tmp_path / "merged")))
    monkeypatch.setattr("recipes.merge.check_space", lambda *_: None)
    code, _, err = run_merge(**keys, output_dir=folder / "merged")
    assert_one_line(code, err, "output_dir")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("recipe", ["evaluate", "generate", "preview", "compare_runs"])
def test_L30_an_output_file_on_a_full_disk(inputs, disk, recipe):
    folder = disk(BLOCK_BYTES)
    (folder / "filler").write_bytes(bytes(BLOCK_BYTES))
    base, rows = f"checkpoint_dir={inputs / 'base'}", inputs / "rows.jsonl"
    config, *overrides = {
        "evaluate": ("evaluate", base, f"dataset.source={rows}", "cache_dir=null", "device=cpu"),
        "generate": ("generate", base, f"prompts_file={rows}", "max_new_tokens=1", "device=cpu"),
        "preview": ("llama_qlora", base, f"dataset.source={rows}", "cache_dir=null", "device=cpu"),
        "compare_runs": ("compare_runs", f"run_dirs=[{inputs / 'run'}]"),
    }[recipe]
    command = ["--config", str(PROJECT / f"configs/{config}.yaml"), *overrides, f"output_file={folder / 'out'}"]
    code, _, err = run_here(recipe, *command)
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and line.startswith(f"error: output_file: the disk of '{folder / 'out'}' is full; free space")


def test_a_full_disk_for_the_cache_stops_nothing(inputs, disk, tmp_path):
    folder = disk(BLOCK_BYTES)
    overrides = [f"cache_dir={folder}", "quantized_cache=true", "max_steps_per_epoch=1", "epochs=1"]
    code, out, err = run_here(*training(inputs, tmp_path / "out", *overrides))
    assert code == 0, err
    assert "the tokens are not kept" in out and "quantized_cache: not kept" in out


def failing(number: int):
    def fail(*arguments, **_):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_L30_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with run_directory(tmp_path / "out", overwrite=False, resumes=False):
        pass
    assert "has no locks" in capsys.readouterr().out


def test_L30_a_file_system_that_flushes_nothing(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    code, _, err = run_here(*training(inputs, tmp_path / "out", "max_steps_per_epoch=1", "epochs=1"))
    assert code == 0, err
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    code, _, err = run_here(*training(inputs, tmp_path / "broken"))
    assert code == 2 and "Input/output error" in err and not (tmp_path / "broken").exists()


def test_L30_a_file_system_that_renames_no_directory_is_found_before_the_first_step(inputs, tmp_path, monkeypatch):
    rename = Path.rename

    def rename_files(path, target):
        if path.is_dir():
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_files)
    code, _, err = run_here(*training(inputs, tmp_path / "out"))
    assert code == 2 and "rename no directories" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_trial_leaves_nothing(inputs, tmp_path, monkeypatch):
    tried = []
    write = checkpoints.try_to_save

    def try_and_look(run_path, *others):
        before = snapshot(run_path)
        write(run_path, *others)
        tried.append(snapshot(run_path) == before)

    monkeypatch.setattr("custom_components.recipe_parts.training.try_to_save", try_and_look)
    assert run_here(*training(inputs, tmp_path / "out", "max_steps_per_epoch=1", "epochs=1"))[0] == 0
    assert tried == [True]


def full_training(inputs: Path, output_dir: Path, *overrides: str) -> list[str]:
    steps = ("epochs=3", "save_every_n_steps=2", "batch_size=4", "val_fraction=0.3")
    arguments = full_arguments(inputs / "base", inputs / "rows.jsonl", output_dir, *steps, *overrides)
    return ["full_single_device", *arguments]


@pytest.mark.parametrize("share", [0.9, pytest.param(0.5, marks=pytest.mark.slow)])
def test_L30_a_disk_too_small_for_a_models_checkpoints_is_said_before_the_first_step(inputs, disk, tmp_path, share):
    """The one that is kept, the one that is written and the best are there at a time."""
    code, _, err = run_here(*full_training(inputs, tmp_path / "out"))
    assert code == 0, err
    num_bytes = size_on_disk(tmp_path / "out/checkpoints/step_000006")
    folder = disk(int(share * 3 * num_bytes))
    code, _, err = run_here(*full_training(inputs, folder / "out"))
    assert_one_line(code, err, "output_dir")
    assert "and up to 3 more are there at a time" in err and "step 1" not in err
    assert not (folder / "out").exists()
    disk(4 * num_bytes)
    code, _, err = run_here(*full_training(inputs, folder / "out"))
    assert code == 0, err
