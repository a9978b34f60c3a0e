"""The loss curves of several runs in one picture, over optimizer steps or over tokens, as SVG."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from custom_components.runs.loss_plot import import_matplotlib, needs_log_axis, points_of, running_mean
from custom_components.runs.recorded_run import RecordedRun

# Okabe and Ito's colours, told apart by colour-blind people too, without their black and yellow; then again, dashed.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_DASHES = ("solid", "dashed", "dotted", "dashdot")
_WIDTH_INCHES, _HEIGHT_INCHES = 5.4, 3.6
# The share of the steps that the running mean of the training loss is over.
_MEAN_SHARE = 0.02
_MOST_POINTS = 1000  # of a line of training losses


def run_style(index: int) -> tuple[str, str]:
    """Give the colour and the dashes of the run of a number, counted from 0."""
    return _COLOURS[index % len(_COLOURS)], _DASHES[index // len(_COLOURS) % len(_DASHES)]


def loss_curves(runs: Mapping[int, RecordedRun], *, over_tokens: bool) -> str | None:
    """Draw training loss, a running mean, as thin lines and validation loss as thick ones with dots.

    Args:
        runs: by the number that gives each its style; their losses are of one unit.
        over_tokens: the horizontal axis counts tokens trained on; otherwise optimizer steps.

    Returns:
        the picture; None where no run has a loss to draw.
    """
    import_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis = "tokens" if over_tokens else "steps"
    with matplotlib.rc_context({"svg.hashsalt": axis, "svg.fonttype": "path", "font.size": 11}):
        figure = Figure(figsize=(_WIDTH_INCHES, _HEIGHT_INCHES), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        drawn = [loss for index, run in runs.items() for loss in _draw(axes, run, index, over_tokens)]
        if not drawn:
            return None
        if needs_log_axis(drawn):
            axes.set_yscale("log")
        per = "pair" if any(run.has_pairs for run in runs.values()) else "supervised token (nats)"
        axes.set(xlabel="tokens trained on" if over_tokens else "optimizer step", ylabel=f"loss per {per}")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if over_tokens:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _draw(axes: Any, run: RecordedRun, index: int, over_tokens: bool) -> list[float]:
    """Draw a run, and return the losses that are seen."""
    colour, dashes = run_style(index)
    steps, losses = _placed(run, run.steps, "loss", over_tokens)
    stride = math.ceil(len(losses) / _MOST_POINTS) or 1
    shown = running_mean(losses, math.ceil(_MEAN_SHARE * len(losses)) | 1)[::stride]
    alone = "." if len(shown) == 1 else ""
    axes.plot(steps[::stride], shown, color=colour, linestyle=dashes, linewidth=0.9, alpha=0.7, marker=alone)
    val_steps, val_losses = _placed(run, run.validations, "val_loss", over_tokens)
    axes.plot(val_steps, val_losses, color=colour, linestyle=dashes, linewidth=2, marker="o", markersize=4)
    return [*shown, *val_losses]


def _placed(
    run: RecordedRun, records: Sequence[Mapping[str, Any]], key: str, over_tokens: bool
) -> tuple[list[int], list[float]]:
    """Collect where a measure is drawn, and its values."""
    steps, values = points_of(records, key)
    if not over_tokens:
        return steps, values
    tokens = run.tokens_by_step()
    placed = [(tokens[step], value) for step, value in zip(steps, values, strict=True) if step in tokens]
    return [place for place, _ in placed], [value for _, value in placed]
