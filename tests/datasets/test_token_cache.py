"""Kept tokens are those that were stored, or are made again."""

import random

import numpy as np
import pytest

from custom_components.datasets.token_cache import TokenCache

ARRAYS = {"tokens": np.arange(5000, dtype=np.int32), "is_supervised": np.arange(5000) % 3 == 0}
COUNTS = {"num_rows": 7, "source": "rows.jsonl"}


@pytest.fixture
def cache(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    cache = TokenCache(tmp_path / "cache", [tmp_path / "rows.jsonl"], [])
    cache.store(ARRAYS, COUNTS)
    return cache


def is_what_was_stored(loaded):
    arrays, counts = loaded
    return (
        counts == COUNTS
        and arrays.keys() == ARRAYS.keys()
        and all(np.array_equal(arrays[name], ARRAYS[name]) for name in ARRAYS)
    )


@pytest.mark.parametrize("name", ["tokens.npy", "is_supervised.npy", "summary.json", "digests.json"])
def test_a_damaged_file_is_noticed_wherever_the_damage_is(cache, tmp_path, capsys, name):
    [file] = (tmp_path / "cache").rglob(name)
    content = file.read_bytes()
    assert is_what_was_stored(cache.load()) and capsys.readouterr().out == ""
    positions = random.Random(name).sample(range(len(content)), min(20, len(content)))
    damaged = [content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :] for position in positions]
    damaged += [content[:-1], b"", bytes(len(content)), b"[]", b"null"]
    for text in damaged:
        file.write_bytes(text)
        assert cache.load() is None
        assert "are damaged: they are made again" in capsys.readouterr().out
    file.unlink()
    assert cache.load() is None


def test_files_that_were_not_stored_are_not_read(cache, tmp_path):
    [directory] = (tmp_path / "cache/tokens").iterdir()
    np.save(directory / "lengths.npy", np.arange(3))
    (directory / "notes.txt").write_text("mine")
    assert is_what_was_stored(cache.load())
