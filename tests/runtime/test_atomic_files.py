"""L18: whole or absent."""

import pytest

from custom_components.runtime.atomic_files import sweep_unfinished, whole_directory


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


def test_what_killed_processes_left_is_swept(tmp_path):
    (tmp_path / ".a.writing-1").mkdir()
    (tmp_path / ".a.replaced-1").mkdir()
    (tmp_path / "a").mkdir()
    sweep_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
