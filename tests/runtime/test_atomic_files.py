"""L18: whole or absent."""

import errno
import itertools
import os
import shutil
import sys
from pathlib import Path

import pytest

from custom_components.runtime.atomic_files import sweep_unfinished, whole_directory, whole_file
from custom_components.runtime.ownership import OwnDirectory


def contents(path):
    return {file.name: file.read_text() for file in path.iterdir()}


def test_what_is_written_appears_at_once_and_replaces(tmp_path):
    for text in ("old", "new"):
        with whole_directory(tmp_path / "a") as directory:
            (directory / "file").write_text(text)
            if text == "new":
                assert contents(tmp_path / "a") == {"file": "old"}
    assert contents(tmp_path / "a") == {"file": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_failure_leaves_what_was_there(tmp_path):
    with whole_directory(tmp_path / "a") as directory:
        (directory / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_directory(tmp_path / "a") as directory:
        (directory / "file").write_text("new")
        raise KeyboardInterrupt
    assert contents(tmp_path / "a") == {"file": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_stop_between_the_two_renames_leaves_what_was_there(tmp_path, monkeypatch):
    with whole_directory(tmp_path / "a") as directory:
        (directory / "file").write_text("old")
    rename = type(tmp_path).rename

    def stop_at_the_second(self, target):
        if ".writing-" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(type(tmp_path), "rename", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt), whole_directory(tmp_path / "a") as directory:
            (directory / "file").write_text("new")
    assert contents(tmp_path / "a") == {"file": "old"}


@pytest.mark.parametrize("is_replaced", [False, True])
def test_what_killed_processes_left_is_swept(tmp_path, is_replaced):
    """What was being replaced comes back unless the replacement is there."""
    for name in (".a.writing-1", ".a.replaced-1", *(["a"] if is_replaced else [])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    sweep_unfinished(tmp_path, {"a": OwnDirectory({"file": lambda path: True})})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert contents(tmp_path / "a") == {"file": "a" if is_replaced else ".a.replaced-1"}


FILE_CALLS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir")
OURS = OwnDirectory({"file[0-9]": lambda path: True})


def killed_at(num_calls, work):
    """Do `work` in a process that is killed when it is about to touch files for the n-th time; tell whether it was."""
    process = os.fork()
    if process == 0:
        so_far = 0

        def count(event, _arguments):
            nonlocal so_far
            so_far += event in FILE_CALLS
            if so_far > num_calls:
                os._exit(9)

        sys.addaudithook(count)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9


def write(folder, text):
    with whole_directory(folder / "a", OURS) as directory:
        for number in range(2):
            (directory / f"file{number}").write_text(text)


def test_killed_at_any_call_of_writing_or_sweeping_there_is_the_old_or_the_new_and_never_half(tmp_path):
    """Also where what is whole was deleted afterwards: half of what it had replaced does not come back."""
    whole = [{f"file{number}": text for number in range(2)} for text in ("old", "new")]
    num_calls = 0
    while True:
        folder = tmp_path / str(num_calls)
        write(folder, "old")
        was_killed = killed_at(num_calls, lambda folder=folder: write(folder, "new"))
        for num_calls_of_sweeping in itertools.count():
            swept = shutil.copytree(folder, tmp_path / f"{num_calls}-{num_calls_of_sweeping}")
            is_swept = not killed_at(num_calls_of_sweeping, lambda swept=swept: sweep_unfinished(swept, {"a": OURS}))
            sweep_unfinished(swept, {"a": OURS})
            assert contents(swept / "a") in whole and [path.name for path in swept.iterdir()] == ["a"]
            if is_swept:
                break
        if (folder / "a").exists():
            shutil.rmtree(folder / "a")
            sweep_unfinished(folder, {"a": OURS})
            assert not (folder / "a").exists() or contents(folder / "a") in whole
        if not was_killed:
            break
        num_calls += 1
    assert num_calls >= 10


def test_what_was_aside_inside_of_what_was_aside_is_swept(tmp_path):
    """The adapter of a checkpoint, whose process was killed while it was written."""
    inner = tmp_path / ".step_000004.writing-1/.adapter.writing-1"
    inner.mkdir(parents=True)
    (inner / "weights").touch()
    adapter = OwnDirectory({"weights": lambda path: True})
    sweep_unfinished(tmp_path, {r"step_\d+": OwnDirectory({"state": lambda path: True, "adapter": adapter})})
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "folder/file"
    for text in ("old", "new"):
        with whole_file(path) as aside:
            aside.write_text(text)
            assert text == "old" or path.read_text() == "old"
    with pytest.raises(KeyError), whole_file(path) as aside:
        aside.write_text("half")
        raise KeyError
    assert contents(path.parent) == {"file": "new"}


def test_what_a_killed_process_left_of_a_file_is_no_part_of_the_next(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".file.writing").symlink_to(tmp_path / "mine")
    with whole_file(tmp_path / "file") as aside:
        aside.write_text("new")
    assert contents(tmp_path) == {"mine": "mine", "file": "new"}
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError), whole_file(tmp_path / "link"):
        pass
    assert (tmp_path / "mine").read_text() == "mine" and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EIO, errno.ENOSPC])
def test_only_a_file_system_that_cannot_flush_goes_without(tmp_path, monkeypatch, number):
    flushed = []

    def fsync(descriptor):
        flushed.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    is_tolerated = number not in (errno.EIO, errno.ENOSPC)
    for whole, inside in ((whole_file, ""), (whole_directory, "file")):
        path, flushed[:] = tmp_path / whole.__name__, []
        try:
            with whole(path) as aside:
                (aside / inside if inside else aside).write_text("new")
            assert is_tolerated and len(flushed) == 2 and flushed[1] == str(tmp_path)
        except OSError as error:
            assert error.errno == number and not is_tolerated and not path.exists()
    assert len(list(tmp_path.iterdir())) == 2 * is_tolerated
