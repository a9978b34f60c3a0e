"""A run checkpoint that is damaged, foreign or newer is named, and passed over where an older one is whole."""

import math

import pytest
import torch
import yaml
from safetensors.torch import save_file

from custom_components.runs.metrics import keep_metrics_until, read_metrics
from custom_components.runs.resuming import open_run_to_resume
from custom_components.runs.state_file import STATE_VERSION, read_state
from custom_components.runtime.errors import UserError

PROGRESS = {
    "num_steps": 4,
    "num_skipped_steps": 0,
    "num_tokens": 100,
    "seconds": 1.5,
    "best_val_loss": 2.0,
    "best_step": 3,
    "num_validations_since_best": 1,
}
CONFIG = dict.fromkeys(("checkpoint_dir", "output_dir"), "a") | {
    "overwrite_output_dir": False,
    "resume_from_checkpoint": False,
    "dataset": {},
    "optimizer": {},
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
}


def stored(**changes):
    return {
        "version": STATE_VERSION,
        "optimizer": {"state": {}, "param_groups": []},
        "scaler": {},
        "data_digest": "abc",
        "progress": PROGRESS,
        "best_adapter": {"a": torch.zeros(2)},
    } | changes


@pytest.fixture
def make_checkpoint(tmp_path):
    def make(state, step=4, config=None):
        path = tmp_path / "run" / "checkpoints" / f"step_{step:06}"
        (path / "adapter").mkdir(parents=True)
        save_file({"a": torch.zeros(2)}, path / "adapter/adapter_model.safetensors")
        torch.save(state, path / "state.pt")
        (path / "config.yaml").write_text(yaml.safe_dump(config or CONFIG))
        return path

    return make


def test_a_whole_one_is_read(make_checkpoint):
    assert read_state(make_checkpoint(stored()))["progress"] == PROGRESS
    in_backward = {"of_parameters": [stored()["optimizer"]]}
    assert read_state(make_checkpoint(stored(optimizer=in_backward, progress=PROGRESS | {"num_steps": 6}), 6))
    before = {key: value for key, value in stored().items() if key != "version"}
    assert read_state(make_checkpoint(before | {"progress": PROGRESS | {"num_steps": 5}}, 5))["data_digest"] == "abc"


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (stored(progress={}), "progress.num_steps: missing"),
        (stored(version=STATE_VERSION + 1), "is of a newer version of this package"),
        (stored(progress=PROGRESS | {"num_steps": 3}), "state.pt is of step 3"),
        (stored(progress=PROGRESS | {"num_steps": -4}), "progress.num_steps: -4"),
        (stored(progress=PROGRESS | {"num_steps": "4"}), "progress.num_steps: '4'"),
        (stored(progress=PROGRESS | {"num_steps": True}), "progress.num_steps: True"),
        (stored(progress=PROGRESS | {"best_val_loss": math.nan}), "best_val_loss nan does not go with best_step 3"),
        (stored(progress=PROGRESS | {"best_step": None}), "does not go with best_step None"),
        (stored(progress=PROGRESS | {"best_step": 9}), "num_steps 4 is less"),
        (stored(progress=PROGRESS | {"seconds": math.inf}), "progress.seconds: inf"),
        (stored(progress=PROGRESS | {"more": 1}), "progress.more: unknown key"),
        (stored(optimizer={"state": []}), "optimizer."),
        (stored(best_adapter={"a": 1}), "best_adapter.a: 1"),
        (stored(data_digest=None), "data_digest: None"),
        ([1], "holds list"),
        ({"model": torch.zeros(1)}, "missing"),
    ],
)
def test_a_wrong_one_is_named_and_passed_over(make_checkpoint, capsys, state, words):
    path = make_checkpoint(state)
    with pytest.raises(UserError) as error:
        read_state(path)
    [message] = error.value.messages
    assert words in message and str(path) in message and len(message) < 600
    older = make_checkpoint(stored(progress=PROGRESS | {"num_steps": 3}), step=3)
    run = open_run_to_resume(True, path.parent.parent)
    assert run is not None and run.path == older
    assert "passed over: resume_from_checkpoint: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", b"\xff"),
        ("config.yaml", b"[1]"),
        ("config.yaml", b"a: &a [*a]"),
        ("adapter/adapter_model.safetensors", b"\x00" * 100),
        ("adapter/adapter_model.safetensors", None),
        ("state.pt", b"PK"),
        ("state.pt", None),
    ],
)
def test_any_damaged_file_of_it_is_named(make_checkpoint, capsys, name, content):
    path = make_checkpoint(stored())
    (path / name).unlink()
    if content is not None:
        (path / name).write_bytes(content)
    with pytest.raises(UserError, match="step_000004"):
        open_run_to_resume(str(path), path)
    assert open_run_to_resume("auto", path.parent.parent) is None
    assert "passed over: " in capsys.readouterr().out


def test_flipped_bytes_of_a_state_are_an_error_or_leave_it_whole(make_checkpoint):
    path = make_checkpoint(stored())
    content = (path / "state.pt").read_bytes()
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        (path / "state.pt").write_bytes(damaged)
        try:
            state = read_state(path)
        except UserError as error:
            assert len(error.messages) == 1
        else:
            assert state.pop("best_adapter")["a"].tolist() == [0, 0]
            assert state == {key: value for key, value in stored().items() if key != "best_adapter"}


def test_a_byte_that_is_not_text_costs_its_line_only(tmp_path, capsys):
    lines = [b'{"step": 1, "loss": 1.0}', b'{"step": 2, "loss": \xff}', b'{"step": "3"}', b'{"step": 4, "loss": 2.5}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines, b'{"step": 5, "lo']))
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 4]
    assert "metrics.jsonl:2 and 1 more lines are damaged and left out" in capsys.readouterr().out
    keep_metrics_until(tmp_path / "metrics.jsonl", tmp_path / "kept.jsonl", 3)
    assert (tmp_path / "kept.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'
