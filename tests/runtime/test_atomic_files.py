"""L18: whole or absent."""

import pytest

from custom_components.runtime.atomic_files import sweep_unfinished, whole_directory
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
