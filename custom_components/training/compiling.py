"""Compiling a model's layers, where it pays."""

import importlib.util
from typing import Literal

import torch
from torchtune.modules import TransformerDecoder

# Compiling takes about a minute: as much as it saves over this many forwards.
_MIN_FORWARDS = 200


def compiles_layers(setting: bool | Literal["auto"], device: torch.device, num_forwards: int) -> bool:
    """What the key `compile` comes to.

    "auto" compiles on CUDA with Triton, which fuses a layer's many small operations, for runs long enough. On the CPU
    compiling takes longer than most runs that a CPU is used for.

    Args:
        num_forwards: of the steps to come.
    """
    if setting != "auto":
        return setting
    has_triton = importlib.util.find_spec("triton") is not None
    return device.type == "cuda" and has_triton and num_forwards >= _MIN_FORWARDS


def compile_layers(model: TransformerDecoder, *, is_optional: bool) -> None:
    """Compile each layer at its first forward, in place.

    Args:
        is_optional: a layer that the compiler fails on runs uncompiled; otherwise the compiler's error is raised.
    """
    torch._dynamo.config.suppress_errors = is_optional
    for layer in model.layers:
        # note: dynamic from the start, because every batch has another number of tokens.
        layer.compile(dynamic=True)
