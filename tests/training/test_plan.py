"""The plan of a run: a pure function of the config and of the rows' lengths."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from custom_components.config.lora_settings import LoRASettings
from custom_components.config.reading import load_settings
from custom_components.datasets.batching import BatchPlan
from custom_components.training.plan import long_warmup, plan_of
from tests.support.paths import PROJECT

LENGTHS = [5, 9, 7, 3, 8, 6, 4]


@pytest.fixture
def plan(monkeypatch):
    monkeypatch.chdir(PROJECT)

    def plan_for(*overrides, has_validation=True):
        base = ["batch_size=2", "gradient_accumulation_steps=2", "epochs=3", "run_val_every_n_steps=null"]
        settings = load_settings(LoRASettings, ["--config", "configs/tiny_qlora.yaml", *base, *overrides])
        return plan_of(settings, LENGTHS, 256, has_validation=has_validation)

    return plan_for


def test_every_row_is_in_one_step_of_each_epoch(plan):
    steps = plan().steps
    assert [step.number for step in steps] == list(range(1, len(steps) + 1))
    for epoch in range(3):
        rows = [row for step in steps if step.epoch == epoch for rows in step.forwards for row in rows]
        assert sorted(rows) == list(range(len(LENGTHS)))
    assert plan() == plan()


def test_it_validates_and_saves_at_the_end_of_an_epoch(plan):
    steps = plan().steps
    ends = [step.number for step in steps if step.number == len(steps) or steps[step.number].epoch != step.epoch]
    assert [step.number for step in steps if step.validates] == ends == [2, 4, 6]
    assert [step.number for step in steps if step.saves] == ends
    assert not any(step.validates for step in plan(has_validation=False).steps)


def test_it_validates_and_saves_every_n_steps_and_at_the_end(plan):
    steps = plan("run_val_every_n_steps=3", "save_every_n_steps=4").steps
    assert [step.number for step in steps if step.validates] == [2, 3, 4, 6]
    assert [step.number for step in steps if step.saves] == [4, 6]


def test_packs_are_made_where_the_config_asks_for_them(plan):
    assert plan("packed=true").num_forwards < plan().num_forwards


def test_rates_rise_over_the_warmup_and_dropout_has_a_seed_of_its_own_in_each_forward(plan):
    first, other = plan("warmup_steps=3", "warmup_ratio=0.0"), plan("seed=1")
    assert first.num_warmup_steps == 3
    assert [step.rate_factor for step in first.steps[:3]] == pytest.approx([1 / 3, 2 / 3, 1])
    seeds = [seed for step in (*first.steps, *other.steps) for seed in step.seeds]
    assert len(set(seeds)) == len(seeds) > len(first.steps) + len(other.steps)
    assert [step.seeds[0] for step in first.steps] == [step.seed for step in first.steps]


def test_the_smallest_of_epochs_and_limits_ends_the_run(plan):
    """An epoch has 2 steps here."""
    for overrides, num_steps in (
        (["epochs=3"], 6),
        (["epochs=0.5"], 1),
        (["epochs=1.5"], 3),
        (["epochs=0.01"], 1),
        (["max_steps=4"], 4),
        (["max_steps=40"], 6),
        (["epochs=2.5", "max_steps=4"], 4),
        (["epochs=2.5", "max_steps_per_epoch=1"], 3),
        (["max_steps_per_epoch=1", "max_steps=2"], 2),
        (["epochs=1000000", "max_steps=3"], 3),
    ):
        assert len(plan(*overrides).steps) == num_steps, overrides


@given(
    *(st.integers(1, 40), st.floats(0.01, 4), st.floats(0.01, 4), st.none() | st.integers(1, 9)),
    *(st.none() | st.integers(1, 30), st.booleans()),
)
def test_a_shorter_run_is_the_beginning_of_a_longer_one(num_rows, epochs, others, per_epoch, max_steps, packed):
    """So that a run resumed with other limits goes on with the rows that come next."""
    lengths = [1 + row % 5 for row in range(num_rows)]
    plan = BatchPlan(2, 2, True, 0, pack_capacity_tokens=8 if packed else None, max_steps_per_epoch=per_epoch)
    shorter, longer = (plan.run_steps(lengths, number, None) for number in sorted([epochs, others]))
    assert 1 <= len(shorter) <= len(longer)
    assert shorter == longer[: len(shorter)]
    assert plan.run_steps(lengths, epochs, max_steps) == plan.run_steps(lengths, epochs, None)[:max_steps]
    whole = BatchPlan(2, 2, True, 0, pack_capacity_tokens=8 if packed else None)
    num_rows_seen = sum(len(rows) for _, forwards in whole.run_steps(lengths, epochs, None) for rows in forwards)
    assert num_rows_seen >= epochs * num_rows * (1 - 1e-6) if not packed else num_rows_seen > 0


@pytest.mark.parametrize(("epochs", "num_steps"), [(1.1, 33), (0.1, 3), (2.7, 81), (0.3, 9), (1.01, 31), (3, 90)])
def test_the_share_of_an_epoch_is_not_rounded_up_by_what_floats_cannot_hold(epochs, num_steps):
    assert len(BatchPlan(1, 1, False, 0).run_steps([1] * 30, epochs, None)) == num_steps


def test_schedules_and_checkpoints_count_to_the_last_step_of_a_shorter_run(plan):
    steps = plan("max_steps=3", "lr_scheduler._component_=custom_components.training.schedules.linear").steps
    assert [step.number for step in steps if step.saves] == [2, 3] == [step.number for step in steps if step.validates]
    unlimited = plan("lr_scheduler._component_=custom_components.training.schedules.linear").steps
    assert steps[-1].rate_factor < unlimited[2].rate_factor


def test_a_warmup_longer_than_the_run_is_said_with_the_rates_it_reaches(plan):
    words = long_warmup(plan("warmup_steps=100", "max_steps=4"), 2e-4)
    assert words is not None
    assert "warm-up of 100 steps is longer than the run of 4" in words
    assert "from 2e-06 to 8e-06 and never reaches 0.0002" in words
    assert long_warmup(plan("warmup_steps=6"), 2e-4) is None
    assert long_warmup(plan("warmup_ratio=1.0"), 2e-4) is None
