"""L17, L18, L28-L30 on file systems that lack what a run uses: locks, flushing and renaming of directories."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.support.adapters import saved_adapter
from tests.support.checkpoints import write_checkpoint
from tests.support.forked_tune import ForkedTune, WarmTune
from tests.support.models import loaded_model, with_random_adapters
from tests.support.paths import PROJECT, snapshot
from tests.support.recipe_runs import arguments
from tests.support.rows import random_dialogs, write_dialogs
from tests.support.run_results import assert_equal, outcome

SOURCE = PROJECT / "tests/support/file_systems.c"
# Lustre without -o flock, and FUSE.
NO_LOCKS = [errno.ENOSYS, errno.EOPNOTSUPP]
NO_FLUSHING = [errno.EINVAL, errno.EOPNOTSUPP]
# EMFILE: gcsfuse, internal/fs/fs.go, `too many objects to be renamed`. Its older versions: ENOSYS.
NO_RENAMING = [errno.EMFILE, errno.ENOTEMPTY]
OTHER_NUMBERS = [pytest.param(number, marks=pytest.mark.slow) for number in (errno.ENOSYS, errno.EPERM, errno.EXDEV)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The library that makes calls fail, see tests/support/file_systems.c."""
    compiler = shutil.which("cc")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("there is no C compiler to make file systems fail with, or no LD_PRELOAD")
    path = tmp_path_factory.mktemp("library") / "file_systems.so"
    built = subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", path, SOURCE, "-ldl"], capture_output=True, text=True, check=False
    )
    if built.returncode != 0:
        pytest.skip(f"the C compiler cannot make a library: {built.stderr.splitlines()[-1]}")
    return path


@pytest.fixture(scope="module")
def tune(library):
    """Starts a `tune` command that such file systems are under, and a test can see that they are."""
    warm = WarmTune({**os.environ, "LD_PRELOAD": str(library), "HF_HUB_OFFLINE": "1"})
    yield lambda *command: ForkedTune("run", *command, warm=warm)
    warm.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_checkpoint(folder / "base")
    write_dialogs(folder / "rows.jsonl", random_dialogs(16))
    saved_adapter(with_random_adapters(loaded_model(folder / "base")), folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def training(inputs, tune):
    """Starts a run of twelve steps by the directory that it writes."""
    steps = ["epochs=2", "max_steps=12", "save_every_n_steps=5", "lora_dropout=0.1", "save_every_minutes=null"]

    def start(output_dir, *overrides):
        command = arguments(inputs / "base", inputs / "rows.jsonl", output_dir, *steps, *overrides)
        return tune("recipes/lora_single_device.py", *command)

    return start


@pytest.fixture(scope="module")
def undisturbed(training, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("undisturbed") / "out"
    result = training(output_dir).result()
    assert result.returncode == 0 and "has no locks" not in result.stdout, result.stderr
    return outcome(output_dir)


@pytest.fixture
def disk(tmp_path):
    """Makes a folder where calls fail, by the call's name and the number of its error."""

    def with_failing(**calls):
        return tmp_path.joinpath("disk", *(f"{call}={number}" for call, number in calls.items()))

    return with_failing


def test_the_library_makes_calls_fail(library, tmp_path):
    folder = tmp_path / "flock=38/fsyncdir=22/renamedir=24"
    (folder / "inside").mkdir(parents=True)
    code = """\
import fcntl, os, sys
def failure(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return error.errno
folder = os.open(sys.argv[1], os.O_RDONLY)
file = os.open(sys.argv[1] + "/file", os.O_CREAT)
print(failure(fcntl.flock, file, fcntl.LOCK_EX), failure(os.fsync, folder), failure(os.fsync, file))
print(failure(os.rename, sys.argv[1] + "/inside", sys.argv[1] + "/b"), failure(os.rename, sys.argv[1] + "/file", "b"))
"""
    command = [sys.executable, "-c", code, str(folder)]
    result = subprocess.run(
        command, env={**os.environ, "LD_PRELOAD": str(library)}, capture_output=True, text=True, cwd=tmp_path
    )
    assert result.stdout.split() == ["38", "22", "None", "24", "None"], result.stderr


@pytest.mark.parametrize(("flock", "fsyncdir"), list(zip(NO_LOCKS, NO_FLUSHING, strict=True)))
def test_L17_L30_without_locks_or_flushing_a_run_warns_and_is_the_same(training, undisturbed, disk, flock, fsyncdir):
    """Killed and gone on with as well."""
    folder = disk(flock=flock, fsyncdir=fsyncdir)
    output_dir = folder / "out"
    process = training(output_dir, "resume_from_checkpoint=auto")
    checkpoint = output_dir / "checkpoints/step_000005"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.result().returncode == -signal.SIGKILL
    result = training(output_dir, "resume_from_checkpoint=auto").result()
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("has no locks") == 1 and "going on from" in result.stdout
    assert_equal(outcome(output_dir), undisturbed)
    # L18, L29: nothing is left aside, and nothing is written elsewhere.
    assert {path.name for path in output_dir.parent.iterdir()} == {"out"}
    assert not [path for path in output_dir.rglob("*") if ".writing" in path.name or ".replaced" in path.name]


@pytest.mark.parametrize("renamedir", [*NO_RENAMING, *OTHER_NUMBERS])
def test_L30_where_no_directory_can_be_renamed_a_run_is_refused_before_its_first_step(training, disk, renamedir):
    folder = disk(renamedir=renamedir)
    folder.parent.mkdir(parents=True)
    before = snapshot(folder.parents[1])
    result = training(folder / "out").result()
    [line] = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith("error: output_dir: a trial checkpoint cannot be written"), line
    assert os.strerror(renamedir) in line and "file systems that rename no directories" in line
    assert snapshot(folder.parents[1]) == before


def test_L30_where_no_directory_can_be_renamed_a_merge_is_refused_before_it_begins(tune, inputs, disk):
    folder = disk(renamedir=errno.EMFILE)
    folder.mkdir(parents=True)
    read = [f"checkpoint_dir={inputs / 'base'}", f"adapter_dir={inputs / 'adapter'}"]
    command = ["recipes/merge.py", "--config", "configs/merge.yaml", *read, f"output_dir={folder / 'merged'}"]
    result = tune(*command).result()
    [line] = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith("error: output_dir: "), line
    assert os.strerror(errno.EMFILE) in line and "file systems that rename no directories" in line
    assert list(folder.iterdir()) == []


def test_a_file_is_written_where_nothing_is_flushed(tune, inputs, disk):
    """An evaluation's results, which replace what was there whole."""
    folder = disk(fsyncdir=errno.EINVAL, renamedir=errno.EMFILE, flock=errno.ENOSYS)
    folder.mkdir(parents=True)
    command = ["--config", "configs/evaluate.yaml", f"checkpoint_dir={inputs / 'base'}", "device=cpu", "cache_dir=null"]
    command += [f"dataset.source={inputs / 'rows.jsonl'}", f"output_file={folder / 'results.json'}"]
    result = tune("recipes/evaluate.py", *command).result()
    assert result.returncode == 0 and [path.name for path in folder.iterdir()] == ["results.json"], result.stderr
