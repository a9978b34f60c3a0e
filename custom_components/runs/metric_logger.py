"""The metric logger of a config: started before the run begins, closed however it ends."""

import contextlib
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
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
    """

    def __init__(self, logger: Any = None, wandb_id: str | None = None) -> None:
        self._logger = logger
        self._wandb_id = wandb_id

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
def metric_logger(node: Mapping[str, Any] | None, run_so_far: RunDirectory | None) -> Iterator[MetricLogger]:
    """Start the logger of a config for the time of the block.

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
    try:
        logger = instantiate(keys)
    except Exception as error:  # note: each library has its own, and none says more than its text
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"metric_logger: {node['_component_']} cannot start ({reason}); mend its keys, or set metric_logger=null"
        ) from None
    try:
        yield MetricLogger(logger, wandb_id)
    finally:
        logger.close()


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
