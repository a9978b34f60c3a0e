"""Estimate of the memory that a training run needs, by kind, before anything is loaded."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torchtune.modules import RMSNorm, TransformerDecoder

from custom_components.config.components import instantiate
from custom_components.config.training_settings import TrainingSettings
from custom_components.memory.simulated_step import StepMemory, simulated_step
from custom_components.models import nf4
from custom_components.models.hidden_states import num_layers_with_backward
from custom_components.models.lora import FrozenLinear
from custom_components.runtime.devices import NUM_LOADING_THREADS

# Memory besides our tensors, measured after imports: on the CPU machine code from oneDNN, bitsandbytes where weights
# are NF4, and the plot; on CUDA the libraries' workspaces (torch does not count its context).
_OVERHEAD_BYTES = {"cpu": 42 * 2**20, "cuda": 64 * 2**20}
_BITSANDBYTES_BYTES = 50 * 2**20
# Heap bytes per byte of step tensors. glibc 2.36 does not reuse a freed aligned block for one of the same size, and
# torch aligns all blocks: measured 1.15 to 1.39. On CUDA torch's allocator reports exact bytes.
_HEAP_SHARE = {"cpu": 1.35, "cuda": 1.0}
# AdamW8bit and similar optimizers keep small tensors in 32 bits; this many parameters are enough to see the ratio.
_OPTIMIZER_PROBE_SIZE = 2**16


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by kind, and the peak that they add up to.

    Attributes:
        num_parameters: of the base in NF4, of the base otherwise, and trained.
        base_bytes: the frozen weights.
        adapter_bytes: the trained parameters, in fp32.
        gradient_bytes: the gradients of the trained parameters.
        optimizer_bytes: the optimizer's state.
        loading_bytes: the weights that are being read while the base is loaded.
        step: the memory of a forward and backward.
        num_layers: those that have a backward.
        overhead_bytes: memory besides tensors.
        heap_share: heap bytes per byte of a step's tensors.
    """

    num_parameters: dict[str, int]
    base_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    loading_bytes: int
    step: StepMemory
    num_layers: int
    overhead_bytes: int
    heap_share: float

    def peak_bytes(self, num_recomputed_layers: int) -> int:
        """Compute the most bytes needed at one time, with so many layers recomputed."""
        constant_bytes = self.base_bytes + self.adapter_bytes + self.overhead_bytes
        step = round(self.heap_share * self.step.peak_bytes(self.num_layers, num_recomputed_layers))
        # From a step's second forward on, the gradients of all adapters add to what the forward needs.
        return constant_bytes + max(self.loading_bytes, self.optimizer_bytes + self.gradient_bytes + step)

    def num_recomputed_layers(self, available_bytes: int) -> int | None:
        """Find the fewest layers to recompute so that the peak fits; None if it does not fit even with all of them."""
        fitting = (k for k in range(self.num_layers + 1) if self.peak_bytes(k) <= available_bytes)
        return next(fitting, None)


def estimate_memory(
    model: TransformerDecoder,
    settings: TrainingSettings,
    dtype: torch.dtype,
    device_type: str,
    row_lengths: Sequence[int],
) -> MemoryEstimate:
    """Estimate the memory of a run whose largest forward has rows of these lengths.

    Args:
        model: on the meta device.
        dtype: of the computation.
        device_type: "cpu" or "cuda".
        row_lengths: in tokens.
    """
    # Shared parameters, such as tied embeddings, are listed once.
    frozen = [
        (model.get_submodule(name.rpartition(".")[0]), parameter)
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    ]
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    num_quantized = sum(
        parameter.numel() for module, parameter in frozen if isinstance(module, FrozenLinear) and module.quantize_base
    )
    largest_bytes = dtype.itemsize * max(parameter.numel() for _, parameter in frozen)
    overhead_bytes = _OVERHEAD_BYTES[device_type]
    if device_type == "cpu":
        overhead_bytes += _BITSANDBYTES_BYTES if num_quantized else 0
        overhead_bytes += largest_bytes  # oneDNN packs a copy of the weight that it multiplies by
    return MemoryEstimate(
        num_parameters={
            "NF4": num_quantized,
            "other frozen": sum(parameter.numel() for _, parameter in frozen) - num_quantized,
            "trained": num_trained,
        },
        base_bytes=sum(_frozen_bytes(module, parameter, dtype) for module, parameter in frozen),
        adapter_bytes=4 * num_trained,
        gradient_bytes=4 * num_trained,
        optimizer_bytes=round(num_trained * optimizer_bytes_per_parameter(settings)),
        loading_bytes=NUM_LOADING_THREADS * largest_bytes,
        step=simulated_step(
            model,
            dtype,
            device_type,
            tuple(row_lengths),
            instantiate(settings.position_loss),
            settings.neftune_noise_alpha,
        ),
        num_layers=num_layers_with_backward(model),
        overhead_bytes=overhead_bytes,
        heap_share=_HEAP_SHARE[device_type],
    )


def optimizer_bytes_per_parameter(settings: TrainingSettings) -> float:
    """Measure what the config's optimizer keeps for every parameter, by letting it take a step."""
    parameter = nn.Parameter(torch.zeros(_OPTIMIZER_PROBE_SIZE))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # paged optimizers say that they do not page on the CPU
        optimizer = instantiate(settings.optimizer, [parameter])
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    state = optimizer.state[parameter].values()
    num_bytes = sum(value.nbytes for value in state if isinstance(value, torch.Tensor) and value.numel() > 1)
    return num_bytes / _OPTIMIZER_PROBE_SIZE


def _frozen_bytes(module: nn.Module, parameter: nn.Parameter, dtype: torch.dtype) -> int:
    if isinstance(module, FrozenLinear) and module.quantize_base:
        weight = nf4.empty(parameter.shape, dtype, torch.device("meta"))
        return sum(tensor.nbytes for tensor in nf4.stored_tensors(weight))
    return parameter.numel() * (4 if isinstance(module, RMSNorm) else dtype.itemsize)
