"""The dtype that a model's own weights are trained in, and what is lost where they are in 16 bits."""

from collections.abc import Mapping
from typing import Any

import torch

from custom_components.training.compiling import has_compiler

# torchao's optimizers round bf16 weights up or down at random, so that on average small updates arrive: measured 93% of
# the weights moved in 20 steps of a steady gradient at a rate of 2e-5, 94% of the distance that fp32 weights went.
_STOCHASTIC = "bf16_stochastic_round"
# torch.optim.AdamW's share of weights of sigma 0.02 that moved in the same 20 steps, at rates of 1e-5 and 2e-5.
_MOVED_AT_1E5, _MOVED_AT_2E5 = 0.15, 0.30


def weights_dtype_with_compiler(dtype: torch.dtype) -> torch.dtype:
    """Choose the dtype of trained weights on a machine whose compiler is not known, and is taken to be there."""
    return torch.float32 if dtype is torch.float16 else dtype


def trained_weights_dtype(
    optimizer: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> tuple[torch.dtype, str | None]:
    """Choose the dtype of trained weights, and say in words what the user should know of it.

    In fp16, whose range is too small for weights that change, and where the optimizer's stochastic rounding cannot be
    compiled, they are in fp32 and cast to `dtype` for each product.

    Args:
        optimizer: the config's node.
        dtype: of the computation.
    """
    if dtype is torch.float16:
        return torch.float32, "the weights are trained in fp32, and computed with in fp16"
    if dtype is not torch.bfloat16:
        return dtype, None
    if not optimizer.get(_STOCHASTIC):
        return dtype, (
            f"warning: {optimizer['_component_']} rounds bf16 weights to the nearest, where small updates are lost: in "
            f"20 measured steps at a rate of 1e-5 only {_MOVED_AT_1E5:.0%} of the weights moved, at 2e-5 "
            f"{_MOVED_AT_2E5:.0%}; use torchao.optim.AdamW8bit with {_STOCHASTIC}: true, or dtype=fp32"
        )
    if not has_compiler(device):
        return torch.float32, (
            f"no compiler is here ({'triton' if device.type == 'cuda' else 'C++'}), which the optimizer's stochastic "
            "rounding needs: the weights are trained in fp32, and computed with in bf16; that takes 4 bytes a weight "
            "instead of 2, and the optimizer's step is slower"
        )
    return dtype, None
