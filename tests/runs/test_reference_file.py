"""L34: the reference's log-probabilities are used only as they were written, for what they were computed for."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from custom_components.runs.recognition import is_reference
from custom_components.runs.reference_file import ReferenceKey, read_reference, write_reference
from custom_components.runtime.errors import UserError

KEY = ReferenceKey(["a", "b"], "base", True, "torch.float32", 512, "llama2", "new", {})
RATINGS = [[[-1.5, -2.25], [-0.1, -1e-300]], [[-3.0, -4.0]]]


@pytest.fixture
def path(tmp_path):
    write_reference(tmp_path / "reference.json", KEY, RATINGS)
    return tmp_path / "reference.json"


def test_L17_values_come_back_bit_for_bit(path, capsys):
    assert read_reference(path, KEY, resumes=True) == RATINGS
    assert read_reference(path.with_name("other"), KEY, resumes=False) is None
    assert capsys.readouterr().out == ""
    assert is_reference(path)


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_L34_a_changed_byte_or_a_cut_file_is_noticed_and_still_ours(path, data):
    content = path.read_bytes()
    index = data.draw(st.integers(len(b'{"reference_digest": '), len(content) - 3))
    other = data.draw(st.integers(32, 126).filter(lambda byte: byte != content[index]))
    damaged = path.with_name("damaged.json")
    kind = data.draw(st.sampled_from(["changed", "cut", "blank"]))
    damaged.write_bytes(
        content[:index] + bytes([other]) + content[index + 1 :]
        if kind == "changed"
        else content[:index]
        if kind == "cut"
        else bytes(len(content))
    )
    read = read_reference(damaged, KEY, resumes=False)
    assert read is None or read == RATINGS  # such as 1E-300 for 1e-300
    assert is_reference(damaged)


def test_a_file_of_others_is_not_ours(path):
    for text in ("", "{}", '{"ratings": []}', "notes"):
        path.write_text(text)
        assert not is_reference(path)


@pytest.mark.parametrize(
    "change",
    [{"pairs": ["a", "c"]}, {"base": "x"}, {"dtype": "torch.bfloat16"}, {"max_seq_len": 256}, {"version": 2}],
)
def test_another_key_is_said_and_computed_anew(path, capsys, change):
    assert read_reference(path, replace(KEY, **change), resumes=True) is None
    said = capsys.readouterr().out
    assert f"is of another {next(iter(change))}: the reference's log-probabilities are computed anew" in said


def test_a_run_that_goes_on_keeps_its_reference(path, capsys):
    other = replace(KEY, adapter="of an SFT run")
    with pytest.raises(UserError, match="init_adapter_from: the run's reference, .* is the adapter that the run began"):
        read_reference(path, other, resumes=True)
    assert read_reference(path, other, resumes=False) is None
    assert "is of another adapter" in capsys.readouterr().out
