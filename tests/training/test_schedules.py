"""Learning-rate schedules."""

import pytest

from custom_components.training import schedules

NUM_STEPS, NUM_WARMUP_STEPS = 50, 5


@pytest.mark.parametrize("schedule", [schedules.constant, schedules.linear, schedules.cosine])
def test_no_step_has_rate_zero_and_warmup_rises_to_the_peak(schedule):
    factors = [schedule(step, NUM_STEPS, NUM_WARMUP_STEPS) for step in range(1, NUM_STEPS + 1)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[:NUM_WARMUP_STEPS] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[NUM_WARMUP_STEPS] == 1
    assert factors[NUM_WARMUP_STEPS:] == sorted(factors[NUM_WARMUP_STEPS:], reverse=True)


@pytest.mark.parametrize("schedule", [schedules.linear, schedules.cosine])
def test_the_last_step_is_near_the_final_ratio(schedule):
    assert schedule(1000, 1000, 0, final_ratio=0.1) == pytest.approx(0.1, abs=1e-3)
    assert schedule(1, 1) == 1


def test_cosine_is_half_way_down_in_the_middle():
    assert schedules.cosine(51, 100, 0) == pytest.approx(0.5)
    assert schedules.linear(26, 100, 0) == pytest.approx(0.75)


def test_warmup_as_a_ratio_or_a_number():
    assert schedules.num_warmup_steps(None, 0.03, 100) == 3
    assert schedules.num_warmup_steps(None, 0.03, 10) == 1
    assert schedules.num_warmup_steps(None, 0.0, 10) == 0
    assert schedules.num_warmup_steps(7, 0.0, 100) == 7


def test_the_rate_falls_from_the_first_step_after_the_warmup():
    """After 20 steps of warm-up the other 80 are those of a run of 80 steps without."""
    for schedule in (schedules.linear, schedules.cosine):
        after = [schedule(step, 100, 20, final_ratio=0.1) for step in range(21, 101)]
        assert after == pytest.approx([schedule(step, 80, 0, final_ratio=0.1) for step in range(1, 81)])
    assert schedules.linear(61, 100, 20) == pytest.approx(0.5)


def test_a_constant_rate_without_warmup_is_the_peak_in_each_step():
    assert [schedules.constant(step, 10, 0) for step in range(1, 11)] == [1.0] * 10
