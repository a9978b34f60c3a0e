"""Parameter groups, gradient clipping and the optimizer's step."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from custom_components.models.lora import LoRALinear
from custom_components.runtime.errors import UserError

# torch's names of what has the parameter's shape: torch/optim/adamw.py, sgd.py, rmsprop.py.
_MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg"}


def adapter_parameter_groups(model: nn.Module, lr: float, lora_plus_ratio: float | None) -> list[dict[str, Any]]:
    """Sort a model's trained parameters into an optimizer's groups, each with its rate.

    Args:
        lr: the rate of all parameters but B, or of all.
        lora_plus_ratio: LoRA+'s lambda: B's rate is `lr` times this, in a second group. None: one group of all.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if lora_plus_ratio is None:
        return [{"params": trained, "lr": lr}]
    b_weights = [module.lora_b.weight for module in model.modules() if isinstance(module, LoRALinear)]
    b_ids = {id(weight) for weight in b_weights}
    others = [parameter for parameter in trained if id(parameter) not in b_ids]
    return [{"params": others, "lr": lr}, {"params": b_weights, "lr": lr * lora_plus_ratio}]


def set_rates(optimizer: Optimizer, peak_rates: Sequence[float], rate_factor: float) -> None:
    """Give each parameter group its peak rate times the schedule's factor."""
    for group, peak_rate in zip(optimizer.param_groups, peak_rates, strict=True):
        set_rate(group, peak_rate * rate_factor)


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Give a parameter group its rate: in place where it is a tensor, as in torchao's compiled optimizers."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def load_optimizer_state(optimizer: Optimizer, stored: dict[str, Any]) -> None:
    """Load an optimizer's state; the settings of its groups stay those that it was made with.

    Raises:
        ValueError, KeyError, RuntimeError: it is of another optimizer or other parameters.
    """
    # note: load_state_dict brings back the groups' old settings; those of the config as it is now have to hold.
    settings_now = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(stored)
    _check_state(optimizer)
    page_loaded_state(optimizer)
    for group, settings in zip(optimizer.param_groups, settings_now, strict=True):
        group.update(settings)


def _check_state(optimizer: Optimizer) -> None:
    """Check what an optimizer keeps for each parameter, as far as it is of the parameter's own shape.

    Raises:
        ValueError: a moment has another shape or is not finite, or a count of steps is negative.
    """
    for parameter, state in optimizer.state.items():
        for name in _MOMENTS & state.keys():
            if state[name] is None:  # of SGD without momentum
                continue
            if not isinstance(state[name], Tensor) or state[name].shape != parameter.shape:
                raise ValueError(f"{name} has another shape than its parameter, {[*parameter.shape]}")
            if type(state[name]) is Tensor and not state[name].isfinite().all():
                raise ValueError(f"{name} is not finite")
        if "step" in state and not 0 <= float(state["step"]) < math.inf:
            raise ValueError(f"step is {float(state['step'])}")


def clip_gradients(optimizer: Optimizer, scaler: GradScaler, clip_grad_norm: float | None) -> Tensor:
    """Undo the scaler's scale and clip the gradient of all parameters to `clip_grad_norm`; return its norm before."""
    scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # note: in fp32, or the norms of bf16 gradients are in bf16, which has three digits.
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, torch.float32)))
    if clip_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad_norm, norm)
    return norm


def update_weights(
    optimizer: Optimizer, scaler: GradScaler, loss: float, grad_norm: float, step: int, forwards: list[list[int]]
) -> bool:
    """Take the optimizer's step; return whether the scaler skipped it because fp16 gradients overflowed.

    Raises:
        UserError: loss or gradient is not finite, and a smaller scale cannot help.
    """
    # Gradients may overflow where the loss does not; at a scale below 1, overflow is not the reason.
    may_overflow = scaler.is_enabled() and scaler.get_scale() >= 1 and math.isfinite(loss)
    is_skipped = may_overflow and not math.isfinite(grad_norm)
    if not is_skipped:
        stop_if_not_finite(loss, grad_norm, step, forwards)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return is_skipped


def stop_if_not_finite(loss: float, grad_norm: float, step: int, forwards: list[list[int]]) -> None:
    """Refuse to continue from a step whose loss or gradient is NaN or infinite.

    Raises:
        UserError: with the step and its rows.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise UserError(
            f"step {step}: loss {loss}, gradient norm {grad_norm}; the rows of the step are {forwards}, "
            "counted from 0. Look at them with recipes/preview.py, or lower optimizer.lr"
        )


def page_loaded_state(optimizer: Optimizer) -> None:
    """Move loaded state to the paged memory in which bitsandbytes' paged optimizers allocate it, in place.

    Its `load_state_dict` leaves ordinary tensors, which would fill the card: bitsandbytes 0.50.2, optim/optimizer.py.
    """
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for name in state.keys() & {"state1", "state2"}:
            buffer = optimizer.get_state_buffer(parameter, dtype=state[name].dtype)  # type: ignore[attr-defined]
            if parameter.is_cuda:
                torch.cuda.synchronize(parameter.device)  # note: the card is still filling the buffer with zeros
            state[name] = buffer.copy_(state[name])
