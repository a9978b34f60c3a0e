"""Estimate of the memory that a training run needs, by kind, before anything is loaded."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torchtune.modules import RMSNorm, TransformerDecoder

from custom_components.memory.simulated_step import StepMemory, simulated_step
from custom_components.models import quantization
from custom_components.models.hidden_states import num_layers_with_backward
from custom_components.models.lora import FrozenLinear
from custom_components.models.pissa import PiSSALinear
from custom_components.models.trained import trained_base_parameters
from custom_components.runtime.devices import NUM_LOADING_THREADS
from custom_components.training.loss import LinearCrossEntropy
from custom_components.training.weights_dtype import weights_dtype_with_compiler

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
class StepParts:
    """What takes memory in a training step, besides the model and the rows.

    Attributes:
        loss_function: gives the losses of supervised positions.
        new_optimizer: makes the optimizer of some parameters.
        neftune_noise_alpha: None: no noise.
        frees_gradients: the backward frees each gradient when it is complete, because the optimizer has used it.
        accumulates: a step has more than one forward.
        num_shards: the devices that each keep a share of the layers' frozen weights.
    """

    loss_function: LinearCrossEntropy
    new_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    neftune_noise_alpha: float | None
    frees_gradients: bool
    accumulates: bool
    num_shards: int = 1


@dataclass(frozen=True)
class Recomputing:
    """What the backward computes again, to need less memory.

    Attributes:
        num_layers: the first so many layers that have a backward keep only their input for it.
        offloads_inputs: these inputs, of all layers then, wait in the host's memory.
    """

    num_layers: int = 0
    offloads_inputs: bool = False


@dataclass(frozen=True)
class AvailableBytes:
    """What a run may take of its device's memory, and of the host's for inputs of layers."""

    of_device: int
    of_host: int = 0


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by kind, and the peak that they add up to.

    Attributes:
        num_parameters: of the base in NF4 and in int8, of the base otherwise, and trained.
        base_bytes: the frozen weights, and what adapters of PiSSA began as.
        trained_bytes: the trained parameters: an adapter's, in fp32, or the model's own.
        trains_adapter: they are an adapter's.
        gradient_bytes: the gradients of the trained parameters; 0 if the backward frees each when it is complete.
        standing_gradient_bytes: those of them that are there when a forward begins, beside what `step` counts.
        optimizer_bytes: the optimizer's state.
        loading_bytes: the weights that are being read while the base is loaded.
        step: the memory of a forward and backward.
        num_layers: those that have a backward.
        overhead_bytes: memory besides tensors.
        heap_share: heap bytes per byte of a step's tensors.
    """

    num_parameters: dict[str, int]
    base_bytes: int
    trained_bytes: int
    trains_adapter: bool
    gradient_bytes: int
    standing_gradient_bytes: int
    optimizer_bytes: int
    loading_bytes: int
    step: StepMemory
    num_layers: int
    overhead_bytes: int
    heap_share: float

    def peak_bytes(self, recomputing: Recomputing) -> int:
        """Compute the most bytes needed at one time."""
        constant_bytes = self.base_bytes + self.trained_bytes + self.overhead_bytes
        step_bytes = self.step.peak_bytes(
            self.num_layers, recomputing.num_layers, offloads_inputs=recomputing.offloads_inputs
        )
        step = round(self.heap_share * step_bytes)
        # Activations go as gradients come: the peak is where the first are all there, or the second.
        step = max(self.standing_gradient_bytes + step, self.gradient_bytes)
        return constant_bytes + max(self.loading_bytes, self.optimizer_bytes + step)

    @property
    def offloaded_bytes(self) -> int:
        """The host's memory that the inputs of all layers take."""
        return self.num_layers * self.step.layer_input_bytes

    @property
    def all_recomputed(self) -> Recomputing:
        return Recomputing(self.num_layers)

    @property
    def all_offloaded(self) -> Recomputing:
        return Recomputing(self.num_layers, offloads_inputs=True)

    def fastest_fitting(self, ladder: Iterable[Recomputing], available: AvailableBytes) -> Recomputing | None:
        """Find the first of some ways to recompute whose peak fits; None if none does."""
        return next((recomputing for recomputing in ladder if self.fits(recomputing, available)), None)

    def fits(self, recomputing: Recomputing, available: AvailableBytes) -> bool:
        fits_host = not recomputing.offloads_inputs or self.offloaded_bytes <= available.of_host
        return fits_host and self.peak_bytes(recomputing) <= available.of_device


def estimate_memory(
    model: TransformerDecoder,
    parts: StepParts,
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
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_trained = sum(parameter.numel() for parameter in trained)
    trained_dtype = weights_dtype_with_compiler(dtype)
    matrices = trained_base_parameters(model)
    num_matrix_weights = sum(parameter.numel() for parameter in matrices)
    # Adapters and norms are trained in fp32.
    trained_bytes = 4 * (num_trained - num_matrix_weights) + trained_dtype.itemsize * num_matrix_weights
    gradient_bytes = 0 if parts.frees_gradients else trained_bytes
    formats = {"nf4": "NF4", "nf4_single": "NF4", "int8": "int8"}
    num_quantized = dict.fromkeys(formats.values(), 0)
    for module, parameter in frozen:
        if isinstance(module, FrozenLinear) and module.quantization is not None:
            num_quantized[formats[module.quantization]] += parameter.numel()
    base = [*(parameter for _, parameter in frozen), *matrices]
    largest_numels = sorted(parameter.numel() for parameter in base)[-NUM_LOADING_THREADS:]
    overhead_bytes = _OVERHEAD_BYTES[device_type]
    if device_type == "cpu":
        overhead_bytes += _BITSANDBYTES_BYTES if num_quantized["NF4"] else 0
        # What oneDNN packs, and the heap does not use again, is about the largest weight of a layer. An output head of
        # 128,256 rows takes nothing of the kind: its products were measured with less than a tenth of its size.
        overhead_bytes += dtype.itemsize * max(parameter.numel() for parameter in model.layers.parameters())
    starts = [module for module in model.modules() if isinstance(module, PiSSALinear)]
    start_bytes = sum(4 * (module.start_a.numel() + module.start_b.numel()) for module in starts)
    return MemoryEstimate(
        num_parameters={
            **num_quantized,
            "other frozen": sum(parameter.numel() for _, parameter in frozen) - sum(num_quantized.values()),
            "trained": num_trained,
        },
        base_bytes=base_bytes(model, dtype, parts.num_shards) + start_bytes,
        trained_bytes=trained_bytes,
        trains_adapter=not matrices,
        gradient_bytes=gradient_bytes,
        # From a step's second forward on, all of them. The first forward's own are those of its `step`.
        standing_gradient_bytes=gradient_bytes if not matrices or parts.accumulates else 0,
        optimizer_bytes=optimizer_bytes(parts.new_optimizer, trained, trained_dtype if matrices else torch.float32),
        loading_bytes=dtype.itemsize * sum(largest_numels),
        step=simulated_step(
            model,
            dtype,
            device_type,
            tuple(row_lengths),
            parts.loss_function,
            parts.neftune_noise_alpha,
            trained_dtype,
        ),
        num_layers=num_layers_with_backward(model),
        overhead_bytes=overhead_bytes,
        heap_share=_HEAP_SHARE[device_type],
    )


def base_bytes(model: TransformerDecoder, dtype: torch.dtype, num_shards: int = 1) -> int:
    """Count the bytes of a model's frozen weights on one device.

    Args:
        dtype: of those that are not in NF4.
        num_shards: the devices that each keep a share of the layers' linear weights, and gather the weights of one
            layer, while those of the next are on their way.
    """
    whole, shared, of_layers = 0, 0, dict.fromkeys(map(str, range(len(model.layers))), 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        module = model.get_submodule(name.rpartition(".")[0])
        num_bytes = _frozen_bytes(module, parameter, dtype)
        if num_shards > 1 and name.startswith("layers.") and isinstance(module, FrozenLinear):
            shared += num_bytes
            of_layers[name.split(".")[1]] += num_bytes
        else:
            whole += num_bytes
    gathered = 2 * max(of_layers.values(), default=0)
    return whole + -(-shared // num_shards) + gathered


def optimizer_bytes(
    new_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    trained: Sequence[torch.Tensor],
    dtype: torch.dtype,
) -> int:
    """Measure what an optimizer keeps, by letting it take a step of a small parameter.

    Args:
        new_optimizer: makes the optimizer of some parameters.
        trained: the parameters, on any device.
        dtype: of their matrices.
    """
    parameter = nn.Parameter(torch.zeros(_OPTIMIZER_PROBE_SIZE, dtype=dtype))
    # note: compiling the step, as torchao's optimizers do, would take a minute.
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")  # paged optimizers say that they do not page on the CPU
        optimizer = new_optimizer([parameter])
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    state = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
    num_bytes = sum(_stored_bytes(value) for value in state if value.numel() > 1)
    return round(sum(parameter.numel() for parameter in trained) * num_bytes / _OPTIMIZER_PROBE_SIZE)


def _stored_bytes(tensor: torch.Tensor) -> int:
    """Count the bytes of a tensor, and of one that stands for others, as torchao's quantized states, theirs."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0] if name != "qmap")
    return tensor.nbytes


def _frozen_bytes(module: nn.Module, parameter: nn.Parameter, dtype: torch.dtype) -> int:
    if isinstance(module, FrozenLinear) and module.quantization is not None:
        weight = quantization.empty(parameter.shape, module.quantization, dtype, torch.device("meta"))
        return sum(tensor.nbytes for tensor in quantization.stored_tensors(weight))
    return parameter.numel() * (4 if isinstance(module, RMSNorm) else dtype.itemsize)
