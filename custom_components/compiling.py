"""Compiling a model's layers, where it pays."""

import importlib.util
from typing import Literal

import torch
from torchtune.modules import TransformerDecoder


def compiles_layers(setting: bool | Literal["auto"], device: torch.device) -> bool:
    """What the key `compile` comes to: "auto" is CUDA with Triton, which fuses a layer's many small operations.

    On the CPU compiling a model takes longer than most runs that a CPU is used for.
    """
    if setting != "auto":
        return setting
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def compile_layers(model: TransformerDecoder, *, is_optional: bool) -> None:
    """Compile each layer at its first forward, in place.

    Args:
        is_optional: a layer that the compiler fails on runs uncompiled; otherwise the compiler's error is raised.
    """
    torch._dynamo.config.suppress_errors = is_optional
    for layer in model.layers:
        # note: dynamic from the start, because every batch has another number of tokens.
        layer.compile(dynamic=True)
