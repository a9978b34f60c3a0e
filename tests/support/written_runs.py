"""Directories of training runs without the training: a resolved config, and records and weights as given."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from custom_components.config.reading import config_text, load_settings
from custom_components.config.training_kinds import AnyTrainingSettings
from tests.support.paths import PROJECT

Records = Sequence[dict[str, Any]]


def step_records(losses: Sequence[float | None], **more: object) -> list[dict[str, Any]]:
    """A record for each optimizer step: 100 tokens in half a second."""
    return [
        {"step": step, "loss": loss, "tokens": 100, "step_seconds": 0.5, "peak_memory_gib": 1.0 + step / 100, **more}
        for step, loss in enumerate(losses, start=1)
    ]


def write_run(
    directory: Path,
    *overrides: str,
    config: str = "tiny_qlora",
    records: Records | None = None,
    samples: Records = (),
    num_planned_steps: int | None = None,
) -> Path:
    """Write the directory of a run.

    Args:
        records: of metrics.jsonl; None: there is no such file.
        num_planned_steps: the run has ended, and has an adapter of 10 parameters; more than it took: it was stopped.
    """
    settings = load_settings(AnyTrainingSettings, ["--config", str(PROJECT / f"configs/{config}.yaml"), *overrides])
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(config_text(settings.model_copy(update={"output_dir": directory})))
    for name, lines in (("metrics.jsonl", records), ("samples.jsonl", samples or None)):
        if lines is not None:
            (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if num_planned_steps is not None:
        num_steps = max(record["step"] for record in records or ())
        steps = {"num_steps": num_steps, "num_planned_steps": num_planned_steps}
        card = {"training_progress": {**steps, "is_finished": num_steps == num_planned_steps}}
        (directory / "adapter").mkdir()
        (directory / "adapter/README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
        save_file({"a": torch.zeros(2, 5)}, directory / "adapter/adapter_model.safetensors")
    return directory
