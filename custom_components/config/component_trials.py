"""Small trials of components, so that arguments they refuse are found before a model is loaded."""

import importlib.util
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

Trial = Callable[[Callable[..., Any], Mapping[str, Any]], None]

# What torchtune's loggers import when they are made.
_LOGGER_PACKAGES = {
    "TensorBoardLogger": "tensorboard",
    "WandBLogger": "wandb",
    "CometLogger": "comet_ml",
    "MLFlowLogger": "mlflow",
}
# Of pyproject.toml.
_EXTRAS = {"tensorboard", "wandb"}


def try_optimizer(target: Callable[..., Any], keys: Mapping[str, Any]) -> None:
    """Make an optimizer of one small parameter; it refuses rates and moments out of range."""
    import torch

    target([{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}], **keys)


def try_schedule(target: Callable[..., Any], keys: Mapping[str, Any]) -> None:
    """Ask a schedule for the first and last factor of a short run.

    Raises:
        ValueError: one of them is negative or not finite.
    """
    for step in (1, 4):
        factor = float(target(step=step, num_steps=4, num_warmup_steps=1, **keys))
        if not math.isfinite(factor) or factor < 0:
            raise ValueError(f"the rate is multiplied by {factor} at step {step} of 4")


def try_loss(target: Callable[..., Any], keys: Mapping[str, Any]) -> None:
    """Make a loss."""
    target(**keys)


def try_preference_loss(target: Callable[..., Any], keys: Mapping[str, Any]) -> None:
    """Compute the loss of two pairs.

    Raises:
        ValueError: it is not one finite number a pair, or there is no reward for each answer.
    """
    import torch

    policy, reference = torch.tensor([[-3.0, -5.0], [-4.0, -2.0]]), torch.tensor([[-4.0, -4.0], [-2.0, -5.0]])
    of_each = {"policy_N2": policy, "reference_N2": reference, "num_tokens_N2": torch.tensor([[2, 3], [4, 1]])}
    losses, rewards = target(answers=SimpleNamespace(**of_each, log_ratios_N2=policy - reference), **keys)
    if losses.shape != (2,) or rewards.shape != (2, 2):
        raise ValueError(f"of 2 pairs it gives losses of shape {[*losses.shape]} and rewards of {[*rewards.shape]}")
    if not losses.isfinite().all():
        raise ValueError(f"of 2 pairs it gives the losses {losses.tolist()}")


def find_logger_package(target: Callable[..., Any], keys: Mapping[str, Any]) -> None:
    """Look for the package that a logger of torchtune needs; making one would write files.

    Raises:
        ImportError: it is not installed.
    """
    package = _LOGGER_PACKAGES.get(getattr(target, "__name__", ""))
    if package is not None and importlib.util.find_spec(package) is None:
        what = f"-e '.[{package}]'" if package in _EXTRAS else package
        raise ImportError(f"it needs the package {package}: pip install {what}")
