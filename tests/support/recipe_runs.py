"""Recipes as a user runs them: `tune run`, forked from a process that has the imports done, or started."""

import importlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from custom_components.config.full_settings import FullSettings
from custom_components.config.lora_settings import LoRASettings
from custom_components.config.preference_settings import PreferenceSettings
from custom_components.config.training_settings import TrainingSettings
from custom_components.runtime.errors import run_recipe
from custom_components.runtime.stopping import STOP_SIGNALS
from tests.support.forked_tune import LIMIT_SECONDS, ForkedTune
from tests.support.paths import PROJECT
from tests.support.rows import random_dialogs, write_dialogs, write_pairs

TUNE = Path(sys.executable).with_name("tune")


# `auto` would estimate the memory of each of these small runs, a third of a second.
WITHOUT_ESTIMATE = "enable_activation_checkpointing=false"


def tune_run(*arguments: str, recipe: str = "lora_single_device") -> subprocess.CompletedProcess[str]:
    """`tune run` of a recipe in the project's directory, until it ends."""
    return ForkedTune("run", f"recipes/{recipe}.py", *arguments).result()


def started_tune(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The `tune` command itself: where what its process does from its start on is what is tested."""
    return subprocess.run(
        [str(TUNE), *arguments],
        cwd=PROJECT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )


def arguments(checkpoint: Path, rows: Path, output_dir: Path, *overrides: str) -> list[str]:
    """A small training run of `checkpoint` on the dialogs in `rows`."""
    return [
        *("--config", "configs/llama_qlora.yaml", f"checkpoint_dir={checkpoint}", f"dataset.source={rows}"),
        *("device=cpu", f"output_dir={output_dir}", "batch_size=2", "gradient_accumulation_steps=1", "cache_dir=null"),
        *(WITHOUT_ESTIMATE, *overrides),
    ]


def preference_arguments(checkpoint: Path, pairs: Path, output_dir: Path, *overrides: str) -> list[str]:
    """A small run of DPO on the pairs in `pairs`, as :func:`arguments` is of fine-tuning on dialogs."""
    names = {"model.checkpoint_dir": checkpoint, "checkpoint_dir": checkpoint, "dataset.source": pairs}
    return [
        *("--config", "configs/tiny_dpo.yaml", *(f"{key}={value}" for key, value in names.items())),
        *("~dataset_val", "run_val_every_n_steps=null", f"output_dir={output_dir}", "overwrite_output_dir=false"),
        "loss._component_=custom_components.training.preference_losses.sigmoid",
        *("device=cpu", "batch_size=2", "cache_dir=null", WITHOUT_ESTIMATE, *overrides),
    ]


def full_arguments(checkpoint: Path, rows: Path, output_dir: Path, *overrides: str) -> list[str]:
    """A small full fine-tuning of `checkpoint` on the dialogs in `rows`."""
    return [
        *(
            "--config",
            str(PROJECT / "configs/tiny_full.yaml"),
            f"checkpoint_dir={checkpoint}",
            f"dataset.source={rows}",
        ),
        *("device=cpu", f"output_dir={output_dir}", "batch_size=2", "cache_dir=null", "dataset_val=null"),
        WITHOUT_ESTIMATE,
        *("overwrite_output_dir=false", "run_val_every_n_steps=null", *overrides),
    ]


class SmallRun(NamedTuple):
    """A recipe's settings, and small runs of it.

    Attributes:
        arguments: given a checkpoint, a file of rows, a directory to write to and overrides.
        write_rows: writes so many rows to a file.
    """

    settings: type[TrainingSettings]
    arguments: Callable[..., list[str]]
    write_rows: Callable[[Path, int], Path]


def _write_dialogs(path: Path, num_dialogs: int) -> Path:
    return write_dialogs(path, random_dialogs(num_dialogs))


# The training recipes, for laws of all of them.
RECIPES = {
    "lora_single_device": SmallRun(LoRASettings, arguments, _write_dialogs),
    "full_single_device": SmallRun(FullSettings, full_arguments, _write_dialogs),
    "lora_dpo_single_device": SmallRun(PreferenceSettings, preference_arguments, write_pairs),
}


def run_here(recipe: str, *arguments: str) -> tuple[int, str, str]:
    """Run a recipe in this process: exit code, stdout and stderr."""
    recipe_main = importlib.import_module(f"recipes.{recipe}").recipe_main
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "argv", [f"{recipe}.py", *arguments]):
        try:
            run_recipe(recipe_main)
        except SystemExit as exit:
            assert isinstance(exit.code, int)
            code = exit.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return code, out.getvalue(), err.getvalue()


def run_merge(**overrides: object) -> tuple[int, str, str]:
    """Run merge.py in this process, with overrides of configs/merge.yaml: exit code, stdout and stderr."""
    config = str(PROJECT / "configs/merge.yaml")
    return run_here("merge", "--config", config, *(f"{key}={value}" for key, value in overrides.items()))
