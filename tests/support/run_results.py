"""What a training run leaves, compared."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

TIMING = {"step_seconds", "tokens_per_second", "peak_memory_gib"}


def records(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def outcome(output_dir: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor], str, dict[str, Any]]:
    """What a run leaves, but for the clock's and the memory's: metrics, weights, last checkpoint and its state."""
    metrics = [{key: value for key, value in record.items() if key not in TIMING} for record in records(output_dir)]
    checkpoint = sorted((output_dir / "checkpoints").iterdir())[-1]
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    state["progress"].pop("seconds")
    [weights] = [*output_dir.glob("adapter/*.safetensors"), *output_dir.glob("model/*.safetensors")]
    return metrics, load_file(weights), checkpoint.name, state


def assert_equal(first: object, second: object) -> None:
    """Equal through and through, tensors bit for bit."""
    if isinstance(first, torch.Tensor):
        assert isinstance(second, torch.Tensor) and torch.equal(first, second)
    elif isinstance(first, Mapping):
        assert isinstance(second, Mapping) and first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert isinstance(second, list | tuple) and len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    else:
        assert first == second
