"""The plot of a run: what is drawn, not how it looks."""

import json
import math

import pytest
from matplotlib.figure import Figure

from custom_components.runs.loss_plot import needs_log_axis, plot_losses, running_mean
from custom_components.runs.recognition import is_plot
from tests.support.tune_process import python_process

# What ipykernel sets it to: kernelapp.py of 7.4.
BACKEND = "module://matplotlib_inline.backend_inline"


@pytest.fixture
def axes_of(tmp_path, monkeypatch):
    """Draw records, and give the axes that were saved."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (saved.append(figure), save(figure, *a, **k))[1])

    def draw(records):
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        plot_losses(path, tmp_path / "loss.png")
        assert is_plot(tmp_path / "loss.png")
        return saved.pop().axes

    return draw


def record(step, loss):
    return {"step": step, "loss": loss, "lr": 1e-3 * step, "grad_norm": None if step % 7 == 3 else 2.0 + step}


@pytest.mark.parametrize("num_steps", [1, 30])
def test_few_steps_are_one_line_each_of_loss_rate_and_norm(axes_of, num_steps):
    records = [record(step, 2.0 + 1 / step) for step in range(1, num_steps + 1)]
    losses, rates, norms = axes_of([*records, {"step": num_steps, "val_loss": 2.5}])
    training, validation = losses.lines
    assert list(training.get_ydata()) == [record["loss"] for record in records]
    assert list(validation.get_xdata()) == [num_steps] and losses.get_yscale() == "linear"
    assert list(rates.lines[0].get_ydata()) == [record["lr"] for record in records]
    assert None not in norms.lines[0].get_ydata()


def test_many_steps_are_points_under_their_running_mean_on_a_log_axis(axes_of):
    losses = [10 * math.exp(-step / 300) * (1 + 0.5 * (-1) ** step) for step in range(1, 2001)]
    loss_axes, *_ = axes_of([record(step, loss) for step, loss in enumerate(losses, 1)])
    points, line = loss_axes.lines
    assert list(points.get_ydata()) == losses and points.get_linestyle() == "None"
    assert loss_axes.get_yscale() == "log" and "mean of 41 steps" in line.get_label()
    mean = list(line.get_ydata())
    assert len(mean) == len(losses)
    # Single losses are off by a half.
    assert mean[1000] == pytest.approx(10 * math.exp(-1001 / 300), rel=0.05)


def test_a_preference_run_shows_margin_and_accuracy_beside_the_loss(axes_of):
    measures = [{"reward_margin": step / 10, "reward_accuracy": step % 2} for step in range(1, 31)]
    records = [record(step, 0.7) | measure for step, measure in enumerate(measures, 1)]
    validation = {"step": 30, "val_loss": 0.5, "val_reward_margin": 2.0, "val_reward_accuracy": 0.75}
    by_label = {axes.get_ylabel(): axes for axes in axes_of([*records, validation])}
    assert set(by_label) == {
        *("loss per pair", "learning rate", "gradient norm"),
        *("margin of rewards, chosen - rejected", "share of pairs right"),
    }
    training, validated = by_label["margin of rewards, chosen - rejected"].lines
    assert list(training.get_ydata()) == [measure["reward_margin"] for measure in measures]
    assert list(validated.get_ydata()) == [2.0]
    assert list(by_label["share of pairs right"].lines[1].get_ydata()) == [0.75]


def test_a_plot_of_no_records_is_drawn(axes_of):
    losses, *_ = axes_of([])
    assert losses.get_yscale() == "linear"


def test_a_running_mean_is_the_mean_and_keeps_a_constant():
    assert running_mean([1.0, 2.0, 6.0, 7.0], 3) == [1.5, 3.0, 5.0, 6.5]
    assert running_mean([4.0] * 9, 5) == [4.0] * 9
    assert running_mean([3.0], 5) == [3.0]


@pytest.mark.parametrize(("losses", "is_log"), [([2, 1], False), ([20, 1], False), ([21, 1], True), ([5, 0], False)])
def test_the_axis_is_logarithmic_where_the_range_needs_it(losses, is_log):
    assert needs_log_axis(losses) is is_log


def test_a_backend_that_a_notebook_names_and_that_is_not_there_stops_no_plot(tmp_path):
    """A cell's command inherits MPLBACKEND, which names a module of the notebook's environment."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record(1, 2.0)) + "\n")
    code = f"import os, pathlib, sys; sys.modules['matplotlib_inline'] = None; os.environ['MPLBACKEND'] = {BACKEND!r}\n"
    code += "from custom_components.runs.loss_plot import plot_losses\n"
    code += "plot_losses(pathlib.Path('metrics.jsonl'), pathlib.Path('loss.png')); print(os.environ['MPLBACKEND'])"
    result = python_process("-c", code, directory=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{BACKEND}\n", "")
    assert is_plot(tmp_path / "loss.png")
