"""The memory of a training step, found by running the step's own code on tensors that have shapes but no values.

What autograd saves and what is temporary are measured on the real step, not modelled a second time. Layers of which
the same is trained are alike, so two or three are enough to extrapolate.
"""

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchtune.modules import RMSNorm, TiedLinear, TransformerDecoder

from custom_components.datasets.batching import Batch
from custom_components.models import quantization
from custom_components.models.hidden_states import first_layer_with_backward
from custom_components.models.lora import FrozenLinear
from custom_components.models.trained import (
    TokenEmbedding,
    TrainedLinear,
    gradients_freed,
    trained_base_parameters,
)
from custom_components.training.gradients import ForwardOptions, accumulate_gradients, supervised_loss
from custom_components.training.loss import LinearCrossEntropy


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors created while it is entered, as long as they live; earlier ones are not counted.

    Args:
        device_type: "cpu" or "cuda". A dropout mask has one byte a value on CUDA, where it is its own operation; on
            the CPU and the meta device it is as wide as the values that it multiplies.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._device_type = device_type
        self._storages: dict[int, weakref.ref] = {}
        self._num_bytes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for storage in _storages((args, kwargs)):
            self._count(storage, 0)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._count(storage, storage.nbytes())
        if self._device_type == "cuda" and func is torch.ops.aten.bernoulli_.float:
            self._recount(result.untyped_storage(), result.numel())
        return result

    def _count(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        key = id(storage)
        if key in self._storages:
            return

        def forget(_: Any) -> None:
            del self._storages[key]
            self.live_bytes -= self._num_bytes.pop(key)

        self._storages[key] = weakref.ref(storage, forget)
        self._num_bytes[key] = num_bytes
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _recount(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        self.live_bytes += num_bytes - self._num_bytes[id(storage)]
        self._num_bytes[id(storage)] = num_bytes


def _storages(values: Any) -> list[torch.UntypedStorage]:
    # note: a quantized tensor reports the bytes of its dequantized weight; the tensors inside it are counted instead.
    tensors = [
        value for value in tree_leaves(values) if isinstance(value, Tensor) and not quantization.is_quantized(value)
    ]
    return [tensor.untyped_storage() for tensor in tensors]


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step needs besides the weights and the optimizer's state, by layers that have a backward.

    Attributes:
        fixed_bytes: the tokens' embeddings, the loss, temporary tensors, where a layer is not recomputed.
        kept_layer_bytes: tensors that one layer keeps for the backward, and its adapters' gradients; the mean of all.
        recomputed_layer_bytes: the same for a layer that is recomputed.
        recomputing_bytes: the same as `fixed_bytes` where all layers are recomputed.
        layer_input_bytes: what may wait in the host's memory of a layer that is recomputed.
    """

    fixed_bytes: int
    kept_layer_bytes: int
    recomputed_layer_bytes: int
    recomputing_bytes: int
    layer_input_bytes: int

    def peak_bytes(self, num_layers: int, num_recomputed_layers: int, *, offloads_inputs: bool = False) -> int:
        """Compute the peak for `num_layers` with a backward, the first `num_recomputed_layers` of them recomputed.

        Args:
            offloads_inputs: all are recomputed, and their inputs wait in the host's memory.
        """
        if num_recomputed_layers == num_layers:
            recomputed = self.recomputing_bytes + num_layers * self.recomputed_layer_bytes
            # The input of the layer that the backward is in, and the next, which is on its way.
            return recomputed - max(0, num_layers - 2) * self.layer_input_bytes if offloads_inputs else recomputed
        kept = (num_layers - num_recomputed_layers) * self.kept_layer_bytes
        peak = self.fixed_bytes + kept + num_recomputed_layers * self.recomputed_layer_bytes
        if num_recomputed_layers == 0:
            return peak
        # By then only the gradients of the kept layers remain, the smaller part.
        return max(peak, self.recomputing_bytes + num_layers * self.recomputed_layer_bytes)


def simulated_step(
    model: TransformerDecoder,
    dtype: torch.dtype,
    device_type: str,
    lengths: tuple[int, ...],
    loss_function: LinearCrossEntropy,
    neftune_noise_alpha: float | None = None,
    trained_dtype: torch.dtype | None = None,
) -> StepMemory:
    """Measure the memory of one forward and backward over rows of these lengths, every token supervised.

    Where the model's own weights are trained, their gradients are as large as they, and are not counted: each is freed
    when it is complete.

    Args:
        model: on the meta device; it is not changed.
        dtype: of the computation.
        device_type: "cpu" or "cuda", which compute attention differently.
        trained_dtype: of the model's own weights that are trained; None: `dtype`.
    """
    frees = bool(trained_base_parameters(model))

    # Of every kind one layer; the first of all has something trained, which gives the others a backward.
    with_backward = list(model.layers[first_layer_with_backward(model) :]) or list(model.layers[:1])
    layers = {_trained_of(layer): layer for layer in reversed(with_backward)}
    first = _trained_of(with_backward[0])

    @cache
    def peak_bytes(kinds: tuple[_Trained, ...], num_recomputed_layers: int) -> int:
        short_model = _with_layers(model, [layers[kind] for kind in kinds])
        with torch.device("meta"):
            for module in short_model.modules():
                _give_shapes(module, dtype, trained_dtype or dtype)
            batch = _batch_without_values(lengths, device_type)
            with LiveBytes(device_type) as memory, gradients_freed(short_model, frees=frees):
                options = ForwardOptions(num_recomputed_layers, neftune_noise_alpha)
                loss_of = supervised_loss(short_model, loss_function, options)
                no_scaler = torch.amp.GradScaler("cpu", enabled=False)
                accumulate_gradients([batch], loss_of, no_scaler, torch.device("meta"))
        return memory.peak_bytes

    def kept_bytes(kind: _Trained) -> int:
        return peak_bytes((first, kind, kind), 0) - peak_bytes((first, kind), 0)

    def recomputed_bytes(kind: _Trained) -> int:
        return peak_bytes((first, kind, kind), 3) - peak_bytes((first, kind), 2)

    kinds = [_trained_of(layer) for layer in with_backward]
    return StepMemory(
        fixed_bytes=peak_bytes((first, first), 0) - 2 * kept_bytes(first),
        kept_layer_bytes=round(sum(map(kept_bytes, kinds)) / len(kinds)),
        recomputed_layer_bytes=round(sum(map(recomputed_bytes, kinds)) / len(kinds)),
        recomputing_bytes=peak_bytes((first, first), 2) - 2 * recomputed_bytes(first),
        layer_input_bytes=sum(lengths) * model.tok_embeddings.embedding_dim * dtype.itemsize,
    )


# What is trained of a layer: names and numbers of values.
_Trained = tuple[tuple[str, int], ...]


def _trained_of(layer: nn.Module) -> _Trained:
    return tuple((name, value.numel()) for name, value in layer.named_parameters() if value.requires_grad)


def _with_layers(model: TransformerDecoder, layers: Sequence[nn.Module]) -> TransformerDecoder:
    """Copy the model with these layers in the place of its own."""
    short_model = copy.copy(model)
    short_model._modules = {name: copy.deepcopy(module) for name, module in model._modules.items() if name != "layers"}
    short_model.layers = nn.ModuleList(copy.deepcopy(layer) for layer in layers)
    if isinstance(model.output, TiedLinear):
        short_model.output = type(model.output)(short_model.tok_embeddings)
    return short_model.train()


def _give_shapes(module: nn.Module, dtype: torch.dtype, trained_dtype: torch.dtype) -> None:
    """Replace one module's parameters and buffers by tensors without values, of the dtypes that loading gives."""
    if isinstance(module, TokenEmbedding):
        module.compute_dtype = dtype
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.requires_grad and isinstance(module, TrainedLinear | TokenEmbedding):
            value = torch.empty(parameter.shape, dtype=trained_dtype)
        elif parameter.requires_grad or isinstance(module, RMSNorm):
            value = torch.empty(parameter.shape, dtype=torch.float32)
        elif isinstance(module, FrozenLinear) and module.quantization is not None:
            value = quantization.empty(parameter.shape, module.quantization, dtype)
        else:
            value = torch.empty(parameter.shape, dtype=dtype)
        setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _batch_without_values(lengths: tuple[int, ...], device_type: str) -> Batch:
    num_tokens = sum(lengths)
    tokens_1T, labels_1T, positions_1T = (torch.empty(1, num_tokens, dtype=torch.long) for _ in range(3))
    supervised_P = torch.empty(num_tokens, dtype=torch.long)
    boundaries = torch.empty(len(lengths) + 1, dtype=torch.int32) if device_type == "cuda" else None
    return Batch(tokens_1T, labels_1T, positions_1T, supervised_P, lengths, boundaries)
