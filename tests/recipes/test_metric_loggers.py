"""Metric loggers in a training run: what they get, and that one which fails leaves everything as it was."""

import importlib.util
import json
import signal
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from custom_components.runtime.errors import UserError
from tests.support.checkpoints import write_checkpoint
from tests.support.paths import PROJECT, snapshot
from tests.support.recipe_runs import arguments, run_here, tune_run
from tests.support.rows import random_dialogs, write_dialogs
from tests.support.run_results import records

DISK_LOGGER = "torchtune.training.metric_logging.DiskLogger"


def test_a_logger_gets_validations_and_one_that_cannot_start_leaves_the_results_alone(tmp_path, monkeypatch):
    """The earlier run's results are there as before, although they were to be overwritten."""
    monkeypatch.chdir(PROJECT)
    common = [
        *("--config", "configs/tiny_qlora.yaml", "cache_dir=null", "max_steps_per_epoch=2", "epochs=1"),
        *(f"output_dir={tmp_path / 'run'}", "sample_prompts=['Who?']", "save_every_n_steps=1"),
    ]
    logs = tmp_path / "logs"
    result = tune_run(*common, f"metric_logger={{_component_: {DISK_LOGGER}, log_dir: {logs}, filename: log.txt}}")
    assert result.returncode == 0, result.stderr
    steps = (logs / "log.txt").read_text()
    for key in ("loss:", "lr:", "tokens_per_second:", "val_loss:", "val_perplexity:"):
        assert f" {key}" in steps
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert tmp_path / "run/torchtune_config.yaml" in before

    (tmp_path / "file").touch()
    broken = f"metric_logger={{_component_: {DISK_LOGGER}, log_dir: {tmp_path / 'file'}, filename: log.txt}}"
    for override in ("overwrite_output_dir=true", "resume_from_checkpoint=true"):
        result = tune_run(*common, broken, override)
        assert result.returncode == 2
        [line] = [line for line in result.stderr.splitlines() if "error" in line]
        assert line.startswith(f"error: metric_logger: {DISK_LOGGER} cannot start (")
        assert before == {path: path.read_bytes() for path in before}
    result = tune_run(*common, "overwrite_output_dir=true", "metric_logger=null")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "run/torchtune_config.yaml").exists()


class LoggerThatFails:
    """Writes into the folder that it gets, and fails when it is told to: at the "start", in "log_config", or never."""

    def __init__(self, log_dir: str, when: str) -> None:
        self.when = when
        folder = Path(log_dir) / "inside"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{when}.txt").touch()
        self.fail("start")

    def fail(self, method: str) -> None:
        if method == self.when:
            raise RuntimeError(f"{method} fails")

    def log_config(self, config) -> None:
        (Path(config.output_dir) / "torchtune_config.yaml").write_text(OmegaConf.to_yaml(config))
        self.fail("log_config")

    def log_dict(self, payload, step) -> None:
        pass

    def close(self) -> None:
        pass


def logger_node(log_dir, when):
    node = f"metric_logger={{_component_: {__name__}.LoggerThatFails, log_dir: '{log_dir}', when: {when}}}"
    return [f"--trust-components={__name__.partition('.')[0]}", node]


@pytest.fixture(scope="module")
def base_and_rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return write_checkpoint(folder / "base"), write_dialogs(folder / "rows.jsonl", random_dialogs(12))


@pytest.mark.parametrize("exists", ["no", "empty", "a run"])
@pytest.mark.parametrize("when", ["start", "log_config", "first step", "SIGTERM", "SIGHUP"])
def test_what_fails_before_the_first_step_leaves_output_dir_as_it_was(
    base_and_rows, tmp_path, monkeypatch, when, exists
):
    """Both signals come while the model is loaded."""
    output_dir = tmp_path / "new/out"
    config, path, *rest = arguments(*base_and_rows, output_dir, "max_steps=2", "epochs=1", "save_every_n_steps=1")
    command = ["lora_single_device", config, str(PROJECT / path), *rest]
    if exists == "empty":
        output_dir.mkdir(parents=True)
    if exists == "a run":
        code, _, err = run_here(*command, *logger_node(output_dir / "logs", "never"))
        assert code == 0 and (output_dir / "torchtune_config.yaml").exists(), err
        command += ["overwrite_output_dir=true", "lora_rank=4"]
    before = snapshot(tmp_path)

    def fail(*_, **__):
        if when == "first step":
            raise UserError("step 1 fails")
        signal.raise_signal(signal.Signals[when])

    if when == "first step":
        monkeypatch.setattr("recipes.lora_single_device.accumulate_gradients", fail)
    elif when.startswith("SIG"):
        monkeypatch.setattr("recipes.lora_single_device.plan_of_run", fail)
    command += logger_node(output_dir / "logs", when.replace(" ", "_"))
    if when == "log_config":
        with pytest.raises(RuntimeError, match="log_config fails"):
            run_here(*command)
    else:
        code, _, err = run_here(*command)
        assert code == (128 + signal.Signals[when] if when.startswith("SIG") else 2), err
    assert snapshot(tmp_path) == before


def test_a_logger_that_was_made_in_part_says_nothing_more_than_why(base_and_rows, tmp_path):
    """torchtune's DiskLogger has a __del__ that needs what its __init__ did not come to."""
    (tmp_path / "file").touch()
    logger = f"metric_logger={{_component_: {DISK_LOGGER}, log_dir: {tmp_path / 'file'}}}"
    result = tune_run(*arguments(*base_and_rows, tmp_path / "new/out", "max_steps=1", logger))
    [line] = result.stderr.splitlines()
    assert line.startswith(f"error: metric_logger: {DISK_LOGGER} cannot start (") and not (tmp_path / "new").exists()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_a_run_that_goes_on_keeps_its_wandb_id(base_and_rows, tmp_path):
    """Through the recipe, offline: two processes, one run."""
    keys = f"_component_: torchtune.training.metric_logging.WandBLogger, log_dir: {tmp_path / 'logs'}, mode: offline"
    overrides = ["epochs=1", "save_every_n_steps=1", f"metric_logger={{{keys}}}", "resume_from_checkpoint=auto"]
    command = arguments(*base_and_rows, tmp_path / "out", *overrides)
    for max_steps in (2, 4):
        result = tune_run(*command, f"max_steps={max_steps}")
        assert result.returncode == 0, result.stderr
        assert [line for line in result.stderr.splitlines() if not line.startswith(("step ", "wandb: "))] == []
    run_id = json.loads((tmp_path / "out/wandb_run.json").read_text())["wandb_run_id"]
    assert [record["step"] for record in records(tmp_path / "out") if "loss" in record] == [1, 2, 3, 4]
    logs = (tmp_path / "logs/wandb").glob("offline-run-*/*.wandb")
    assert [path.name for path in logs] == [f"run-{run_id}.wandb"] * 2
