"""The metric logger of a config: started before the run begins, closed however it ends."""

import contextlib
import json
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from custom_components.config.components import component, instantiate
from custom_components.runs.recognition import WANDB_ID_KEY
from custom_components.runs.run_directory import RunDirectory
from custom_components.runtime.atomic_files import whole_file
from custom_components.runtime.errors import UserError


class MetricLogger:
    """What a run sends to the logger that `metric_logger` names; nothing, where it names none.

    Args:
        logger: of torchtune's interface, MetricLoggerInterface.
        wandb_id: of the run at Weights & Biases.

    Attributes:
        has_begun: whether the config was logged.
    """

    def __init__(self, logger: Any = None, wandb_id: str | None = None) -> None:
        self._logger = logger
        self._wandb_id = wandb_id
        self._at_begin: list[Callable[[], None]] = []
        self.has_begun = False

    def at_begin(self, action: Callable[[], None]) -> None:
        """Have something done when there is a first step to record, and a run may replace what is in its directory."""
        self._at_begin.append(action)

    def begin(self) -> None:
        for action in self._at_begin:
            action()

    def log_config(self, config: str, directory: RunDirectory) -> None:
        """Log the resolved config, and keep the id under which a resumed run goes on.

        Args:
            config: the text of config.yaml.
        """
        if self._wandb_id is not None:
            with whole_file(directory.wandb_run) as aside:
                aside.write_text(json.dumps({WANDB_ID_KEY: self._wandb_id}), encoding="utf-8")
        if hasattr(self._logger, "log_config"):
            from omegaconf import OmegaConf

            self._logger.log_config(OmegaConf.create(_escaped(yaml.safe_load(config))))
        self.has_begun = True

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Log the numbers of a record that are there."""
        if self._logger is not None:
            self._logger.log_dict({key: value for key, value in record.items() if value is not None}, step=step)

    def log_samples(self, prompts: Sequence[str], answers: Sequence[str], step: int) -> None:
        """Log answers as text, if the logger is TensorBoard's or Weights & Biases'; the others take numbers only."""
        # note: torchtune's interface has no method for text, so the library below it is called.
        writer: Any = getattr(self._logger, "_writer", None)
        wandb: Any = getattr(self._logger, "_wandb", None)
        if hasattr(writer, "add_text"):
            for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1):
                # Indented by four, Markdown shows it as it is.
                text = f"**{prompt}**\n\n" + "".join(f"    {line}\n" for line in answer.splitlines())
                writer.add_text(f"sample_prompts/{index}", text, global_step=step)
        elif wandb is not None and wandb.run:
            table = wandb.Table(
                ["step", "prompt", "answer"], [[step, *pair] for pair in zip(prompts, answers, strict=True)]
            )
            wandb.log({"sample_prompts": table, "global_step": step})


@contextlib.contextmanager
def metric_logger(
    node: Mapping[str, Any] | None, directory: RunDirectory, run_so_far: RunDirectory | None
) -> Iterator[MetricLogger]:
    """Start the logger of a config for the time of the block.

    What it wrote into the run's directory is deleted if the run does not begin.

    Args:
        node: the config's `metric_logger`.
        run_so_far: of a resumed run.

    Raises:
        UserError: it cannot be started.
    """
    if node is None:
        yield MetricLogger()
        return
    keys, wandb_id = dict(node), None
    if component(node["_component_"]).__name__ == "WandBLogger":
        wandb_id = keys.get("id") or _kept_wandb_id(run_so_far) or secrets.token_hex(4)
        # A resumed run may have another config, resume_from_checkpoint for example.
        keys = {"resume": "allow", "allow_val_change": True, **keys, "id": wandb_id}
    before = set(directory.path.rglob("*"))
    metrics = MetricLogger()
    written: list[Path] = []
    try:
        try:
            logger = _started(keys)
        finally:
            written = _highest_new(directory.path, before)
        try:
            metrics = MetricLogger(logger, wandb_id)
            yield metrics
        finally:
            logger.close()
    finally:
        for path in [] if metrics.has_begun else written:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _started(keys: dict[str, Any]) -> Any:
    """Make a logger.

    Raises:
        UserError: it cannot be started.
    """
    hook = sys.unraisablehook
    # note: torchtune's DiskLogger that was not made whole prints a traceback when it is deleted.
    sys.unraisablehook = lambda _: None
    try:
        return instantiate(keys)
    except Exception as error:  # note: each library has its own, and none says more than its text
        reason = " ".join(str(error).split()) or type(error).__name__
    finally:
        sys.unraisablehook = hook
    raise UserError(
        f"metric_logger: {keys['_component_']} cannot start ({reason}); mend its keys, or set metric_logger=null"
    )


def _highest_new(folder: Path, before: set[Path]) -> list[Path]:
    """List what is new in a folder, without what is inside of it."""
    new = set(folder.rglob("*")) - before
    return sorted(path for path in new if path.parent not in new)


def _kept_wandb_id(run_so_far: RunDirectory | None) -> str | None:
    if run_so_far is None or not run_so_far.wandb_run.is_file():
        return None
    try:
        return json.loads(run_so_far.wandb_run.read_text(encoding="utf-8"))[WANDB_ID_KEY]
    except (ValueError, KeyError, TypeError):
        return None  # torn by a power cut: it goes on as a run of its own


def _escaped(value: Any) -> Any:
    """Escape what OmegaConf would take for a reference to another key: in a resolved config it is text."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.replace("${", r"\${") if isinstance(value, str) else value
