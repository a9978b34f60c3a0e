"""The memory of a training step, found by running the step's own code on tensors that have shapes but no values.

What autograd saves and what is temporary are measured on the real step, not modelled a second time. Layers are alike,
so two or three are enough to extrapolate.
"""

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchtune.modules import RMSNorm, TransformerDecoder

from custom_components.datasets.batching import Batch
from custom_components.models import nf4
from custom_components.models.lora import FrozenLinear
from custom_components.training.gradients import ForwardOptions, accumulate_gradients, supervised_loss
from custom_components.training.loss import LinearCrossEntropy


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors created while it is entered, as long as they live; earlier ones are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for storage in _storages((args, kwargs)):
            self._count(storage, 0)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._count(storage, storage.nbytes())
        return result

    def _count(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        key = id(storage)
        if key in self._storages:
            return

        def forget(_: Any) -> None:
            del self._storages[key]
            self.live_bytes -= num_bytes

        self._storages[key] = weakref.ref(storage, forget)
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    # note: an NF4 tensor reports the bytes of its dequantized weight; the tensors inside it are counted instead.
    tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor) and not nf4.is_quantized(value)]
    return [tensor.untyped_storage() for tensor in tensors]


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step needs besides the weights and the optimizer's state, by layers.

    Attributes:
        fixed_bytes: the tokens' embeddings, the loss, temporary tensors.
        kept_layer_bytes: tensors that one layer keeps for the backward, and its adapters' gradients.
        recomputed_layer_bytes: the same for a layer that is recomputed.
        recomputing_bytes: temporary tensors while one layer is recomputed.
    """

    fixed_bytes: int
    kept_layer_bytes: int
    recomputed_layer_bytes: int
    recomputing_bytes: int

    def peak_bytes(self, num_layers: int, num_recomputed_layers: int) -> int:
        """Compute the peak for a model of `num_layers` of which the first `num_recomputed_layers` are recomputed."""
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
) -> StepMemory:
    """Measure the memory of one forward and backward over rows of these lengths, every token supervised.

    Args:
        model: on the meta device, with two layers or more; it is not changed.
        dtype: of the computation.
        device_type: "cpu" or "cuda", which compute attention differently.
    """

    def peak_bytes(num_layers: int, num_recomputed_layers: int) -> int:
        short_model = _with_layers(model, num_layers)
        with torch.device("meta"):
            for module in short_model.modules():
                _give_shapes(module, dtype)
            batch = _batch_without_values(lengths, device_type)
            with LiveBytes() as memory:
                options = ForwardOptions(num_recomputed_layers, neftune_noise_alpha)
                loss_of = supervised_loss(short_model, loss_function, options)
                no_scaler = torch.amp.GradScaler("cpu", enabled=False)
                accumulate_gradients([batch], loss_of, no_scaler, torch.device("meta"))
        return memory.peak_bytes

    two_kept, three_kept = peak_bytes(2, 0), peak_bytes(3, 0)
    two_recomputed, three_recomputed = peak_bytes(2, 2), peak_bytes(3, 3)
    kept_layer_bytes = three_kept - two_kept
    recomputed_layer_bytes = three_recomputed - two_recomputed
    return StepMemory(
        fixed_bytes=two_kept - 2 * kept_layer_bytes,
        kept_layer_bytes=kept_layer_bytes,
        recomputed_layer_bytes=recomputed_layer_bytes,
        recomputing_bytes=two_recomputed - 2 * recomputed_layer_bytes,
    )


def _with_layers(model: TransformerDecoder, num_layers: int) -> TransformerDecoder:
    """Copy the model with so many of its layers."""
    short_model = copy.copy(model)
    short_model._modules = {name: copy.deepcopy(module) for name, module in model._modules.items() if name != "layers"}
    short_model.layers = nn.ModuleList(copy.deepcopy(model.layers[0]) for _ in range(num_layers))
    return short_model.train()


def _give_shapes(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace one module's parameters and buffers by tensors without values, of the dtypes that loading gives."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.requires_grad or isinstance(module, RMSNorm):
            value = torch.empty(parameter.shape, dtype=torch.float32)
        elif isinstance(module, FrozenLinear) and module.quantize_base:
            value = nf4.empty(parameter.shape, dtype)
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
