"""An optimizer that takes its steps during the backward, so that no gradient outlives the next one.

torchtune has the same, as `optimizer_in_bwd`. It excludes what needs all gradients at once: accumulation over several
forwards, clipping by their norm, and fp16's gradient scaler.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from custom_components.training.optimizer import load_optimizer_state, set_rate


class OptimizerInBackward(Optimizer):
    """One optimizer for each parameter, whose step is taken and whose gradient is freed as soon as it is complete.

    Args:
        groups: parameter groups, each with its rate.
        make: makes an optimizer of parameter groups.
    """

    def __init__(self, groups: list[dict[str, Any]], make: Callable[[list[dict[str, Any]]], Optimizer]) -> None:
        super().__init__(groups, {})
        self._optimizers: list[Optimizer] = []
        self._squares: Tensor | None = None
        for group in self.param_groups:
            for parameter in group["params"]:
                optimizer = make([{**group, "params": [parameter]}])
                parameter.register_post_accumulate_grad_hook(partial(self._take_step, group, optimizer))
                self._optimizers.append(optimizer)

    def gradient_norm(self) -> Tensor:
        """Return the norm of the gradient of all parameters since the last call: a scalar in fp32."""
        assert self._squares is not None, "no backward"
        norm, self._squares = self._squares.sqrt(), None
        return norm

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing: the backward has taken the step."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: the backward has freed the gradients."""

    def state_dict(self) -> dict[str, Any]:
        return {"of_parameters": [optimizer.state_dict() for optimizer in self._optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave.

        Raises:
            ValueError, KeyError: it is of another optimizer or other parameters.
        """
        for optimizer, stored in zip(self._optimizers, state_dict["of_parameters"], strict=True):
            load_optimizer_state(optimizer, stored)

    def _take_step(self, group: dict[str, Any], optimizer: Optimizer, parameter: Tensor) -> None:
        assert parameter.grad is not None
        squares = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()
        self._squares = squares if self._squares is None else self._squares + squares
        set_rate(optimizer.param_groups[0], group["lr"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
