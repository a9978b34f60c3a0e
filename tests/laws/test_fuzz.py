"""What is damaged or hostile is refused in one clear line, or read as what it is: a part of what `make fuzz` tries."""

import pytest

from tests.support.fuzz import Fuzz

NUM_INPUTS = 200
NUM_TESTS = 4


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    return Fuzz(tmp_path_factory.mktemp("fuzz"), seed=0)


@pytest.mark.parametrize("part", range(NUM_TESTS))
def test_no_damaged_input_is_a_traceback_a_wait_or_taken_for_another(fuzz, part, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_the_secret")
    outcomes = [fuzz.outcome(number) for number in range(part, NUM_INPUTS, NUM_TESTS)]
    wrong = [outcome for outcome in outcomes if outcome.what not in ("accepted", "error")]
    assert not wrong, wrong[0].words
    assert not [outcome for outcome in outcomes if "hf_the_secret" in outcome.words]
    assert sum(outcome.what == "error" for outcome in outcomes) > len(outcomes) / 3
