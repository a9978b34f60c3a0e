"""The plot of a run: losses, and below them the learning rate and the gradient norm.

Beside them, of a run that learns preferences: the margin of rewards, and the share of pairs that it gets right.
"""

import math
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from custom_components.runs.metrics import read_metrics
from custom_components.runtime.atomic_files import whole_file

# By this in its file a later run knows that the plot is not a person's own.
PLOT_AUTHOR = "llama-lora-recipes"
# Above this number of steps the losses are points, and the line is their running mean.
_MOST_STEPS_OF_A_LINE = 200
# The share of the steps that a running mean is over.
_MEAN_SHARE = 0.02
# From this ratio of the largest loss to the smallest, the axis is logarithmic.
_LOG_AXIS_RATIO = 20.0


def plot_losses(metrics_path: Path, plot_path: Path) -> None:
    """Draw training and validation loss, learning rate and gradient norm over the optimizer steps.

    Records with a `reward_margin` are of a preference run, whose loss is per pair.
    """
    import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    records = read_metrics(metrics_path)
    has_pairs = any("reward_margin" in record for record in records)
    columns = [["loss", "lr", "grad_norm"], *([["reward_margin", "reward_accuracy", "reward_accuracy"]] * has_pairs)]
    figure = Figure(figsize=(8 * len(columns), 7), layout="constrained")
    FigureCanvasAgg(figure)
    rows = [[*row] for row in zip(*columns, strict=True)]
    panels: dict[str, Any] = figure.subplot_mosaic(rows, sharex=True, height_ratios=(4, 1, 1))
    loss_label = f"loss per {'pair' if has_pairs else 'supervised token (nats)'}"
    _draw_measure(panels["loss"], records, "loss", loss_label, may_be_log=True)
    for key, label in (("lr", "learning rate"), ("grad_norm", "gradient norm")):
        _draw(panels[key], *points_of(records, key), color="C0")
        panels[key].set_ylabel(label)
    if has_pairs:
        _draw_measure(panels["reward_margin"], records, "reward_margin", "margin of rewards, chosen - rejected")
        _draw_measure(panels["reward_accuracy"], records, "reward_accuracy", "share of pairs right")
        panels["reward_accuracy"].set_ylim(-0.05, 1.05)
    for column in columns:
        panels[column[-1]].set_xlabel("optimizer step")
        panels[column[-1]].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels.values():
        axes.grid(alpha=0.3)
    figure.align_ylabels()
    with whole_file(plot_path) as aside:
        figure.savefig(aside, dpi=120, format="png", metadata={"Author": PLOT_AUTHOR})


def import_matplotlib() -> None:
    """Import matplotlib in a way that leaves no file behind and needs no window.

    note: it keeps its list of fonts in the home directory, unless another is named before its import. And in a command
    that a notebook starts, MPLBACKEND names a backend of the notebook's own environment, which may not be there.
    """
    with tempfile.TemporaryDirectory() as font_list_dir:
        os.environ.setdefault("MPLCONFIGDIR", font_list_dir)
        backend = os.environ.pop("MPLBACKEND", None)
        try:
            import matplotlib.backends.backend_agg  # noqa: F401
        finally:
            if backend is not None:
                os.environ["MPLBACKEND"] = backend


def points_of(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Collect the steps at which `key` is a number, and the numbers."""
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def running_mean(values: Sequence[float], num_values: int) -> list[float]:
    """Average each value with its neighbours, `num_values` in all, fewer at both ends."""
    num_beside = num_values // 2
    return [
        statistics.fmean(values[max(0, index - num_beside) : index + num_beside + 1]) for index in range(len(values))
    ]


def needs_log_axis(losses: Sequence[float]) -> bool:
    """Tell whether losses differ so much that the small ones would be a flat line."""
    return bool(losses) and min(losses) > 0 and max(losses) > _LOG_AXIS_RATIO * min(losses)


def _draw_measure(
    axes: Any, records: Sequence[dict[str, Any]], key: str, label: str, *, may_be_log: bool = False
) -> None:
    """Draw what is measured both while training and while validating, as the loss is."""
    steps, values = points_of(records, key)
    val_steps, val_values = points_of(records, f"val_{key}")
    shown = values
    if len(steps) > _MOST_STEPS_OF_A_LINE:
        axes.plot(steps, values, ".", color="C0", alpha=0.25, markersize=3, markeredgewidth=0)
        num_steps = math.ceil(_MEAN_SHARE * len(steps)) | 1  # odd: the mean is of a step and its neighbours
        shown = running_mean(values, num_steps)
        _draw(axes, steps, shown, color="C0", label=f"training, mean of {num_steps} steps")
    else:
        _draw(axes, steps, values, color="C0", label="training")
    if val_steps:
        axes.plot(val_steps, val_values, "o-", color="C1", label="validation", linewidth=1.5, markersize=4)
    if may_be_log and needs_log_axis([*shown, *val_values]):
        axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.legend()


def _draw(axes: Any, steps: list[int], values: list[float], **style: Any) -> None:
    axes.plot(steps, values, marker="o" if len(steps) == 1 else "", linewidth=1.2, markersize=4, **style)
