"""Compiling a model's layers where that saves time."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torchtune.modules import TransformerDecoder

from custom_components.runtime.terminal import say

# Compiling takes about a minute: as much as it saves over this many forwards.
_MIN_FORWARDS = 200


@contextmanager
def compiled_layers(
    model: TransformerDecoder, setting: bool | Literal["auto"], device: torch.device, num_forwards: int
) -> Iterator[None]:
    """Compile each layer at its first forward in the block; after the block layers run uncompiled again.

    Args:
        setting: the key `compile`. True compiles. "auto" compiles long runs on CUDA with Triton, which fuses a layer's
            many small operations, and runs a layer uncompiled where the compiler fails. On the CPU compiling takes
            longer than most runs that a CPU is used for.
        num_forwards: the forwards of the steps to come.
    """
    if not (_saves_time(device, num_forwards) if setting == "auto" else setting):
        yield
        return
    say("compiling the layers: the first step takes about a minute longer, and so does the first validation")
    with torch._dynamo.config.patch(suppress_errors=setting == "auto"):
        for layer in model.layers:
            # note: dynamic from the start, because every batch has another number of tokens.
            layer.compile(dynamic=True)
        try:
            yield
        finally:
            for layer in model.layers:
                layer._compiled_call_impl = None  # what `compile` has set


def _saves_time(device: torch.device, num_forwards: int) -> bool:
    has_triton = importlib.util.find_spec("triton") is not None
    return device.type == "cuda" and has_triton and num_forwards >= _MIN_FORWARDS
