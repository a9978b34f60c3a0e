"""The results of an evaluation: a table for people, JSON for programs."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from custom_components.runtime.output_file import replaced_file

_NUM_COLUMNS = 80

# The measures of one model over one subject (a source of rows, a task), by their names: `{"loss": 2.5}`.
Measures = Mapping[str, float | int]


def results_table(subjects: Mapping[str, Mapping[str, Measures]]) -> str:
    """Tabulate every measure of every subject, the models' values side by side, in at most 80 columns.

    Args:
        subjects: the measures of each model, by the subject's name and the model's; the same measures for each model.
    """
    models = list(next(iter(subjects.values())))
    lines = [("", "", *models)]
    for subject, by_model in subjects.items():
        for measure in by_model[models[0]]:
            values = (by_model[model][measure] for model in models)
            lines.append((subject, measure.replace("_", " "), *map(_written, values)))
            subject = ""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths[0] = min(widths[0], _NUM_COLUMNS - sum(width + 2 for width in widths[1:]))
    return "\n".join(_line(cells, widths) for cells in lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    subject, measure, *values = cells
    # Cut at the start, because paths differ at their ends.
    subject = subject if len(subject) <= widths[0] else f"…{subject[len(subject) - widths[0] + 1 :]}"
    columns = [subject.ljust(widths[0]), measure.ljust(widths[1])]
    return "  ".join([*columns, *map(str.rjust, values, widths[2:])]).rstrip()


def _written(value: float | int) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"


# By these a results file is known: an earlier one may be replaced.
RESULTS_KEYS = {"checkpoint_dir", "adapter_dir", "results", "answers"}


@contextlib.contextmanager
def results_file(path: Path | None) -> Iterator[dict[str, Any]]:
    """Yield a dict that is written to `path` as JSON when the block succeeds; None: it is not written.

    Raises:
        UserError: nothing can be written there, or something else than an earlier evaluation's results is there; this
            is checked before the block begins.
    """
    results: dict[str, Any] = {}
    if path is None:
        yield results
        return
    with replaced_file(path, _is_results, "the results of an evaluation") as aside:
        yield results
        aside.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_results(path: Path) -> bool:
    try:
        results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(results, dict) and results.keys() >= RESULTS_KEYS
