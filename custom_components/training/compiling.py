"""Compiling a model's layers where that saves time."""

import importlib.util
import os
import shutil
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


def has_compiler(device: torch.device) -> bool:
    """Tell whether torch.compile can work: it needs Triton on CUDA, and a C++ compiler in any case."""
    has_triton = device.type != "cuda" or importlib.util.find_spec("triton") is not None
    return has_triton and any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))


def _saves_time(device: torch.device, num_forwards: int) -> bool:
    has_triton = importlib.util.find_spec("triton") is not None
    return device.type == "cuda" and has_triton and num_forwards >= _MIN_FORWARDS


@contextmanager
def compiled_optimizer(device: torch.device) -> Iterator[None]:
    """Inside the block, let optimizers that compile their step, as torchao's do, run uncompiled if nothing can be."""
    if has_compiler(device):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
