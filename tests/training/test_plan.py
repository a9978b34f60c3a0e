"""The plan of a run: a pure function of the config and of the rows' lengths."""

import pytest

from custom_components.config.reading import load_settings
from custom_components.config.training_settings import TrainingSettings
from custom_components.training.plan import plan_of
from tests.support.paths import PROJECT

LENGTHS = [5, 9, 7, 3, 8, 6, 4]


@pytest.fixture
def plan(monkeypatch):
    monkeypatch.chdir(PROJECT)

    def plan_for(*overrides, has_validation=True):
        base = ["batch_size=2", "gradient_accumulation_steps=2", "epochs=3", "run_val_every_n_steps=null"]
        settings = load_settings(TrainingSettings, ["--config", "configs/tiny_qlora.yaml", *base, *overrides])
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


def test_rates_rise_over_the_warmup_and_dropout_has_a_seed_of_its_own_in_each_step(plan):
    first, other = plan("warmup_steps=3", "warmup_ratio=0.0"), plan("seed=1")
    assert first.num_warmup_steps == 3
    assert [step.rate_factor for step in first.steps[:3]] == pytest.approx([1 / 3, 2 / 3, 1])
    seeds = [step.seed for step in (*first.steps, *other.steps)]
    assert len(set(seeds)) == len(seeds)
