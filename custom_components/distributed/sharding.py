"""A frozen base of which every rank keeps a share, and gathers one layer at a time for its forward and its backward.

FSDP2's `fully_shard` does it, over the tensors that quantized weights are stored in, as plain parameters: they divide
by any number of ranks, which torchao's NF4Tensor does not. Adapters, norms, embeddings and the output head are whole on
every rank, so that gradients, clipping, optimizer and files are those of one device.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from custom_components.distributed.ranks import Ranks
from custom_components.models import quantization
from custom_components.models.lora import FrozenLinear


class LayerShards:
    """Shards the layers of a model over the ranks, each as soon as it is loaded."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks = ranks
        self._mesh = init_device_mesh(device.type, (ranks.num,))

    def is_read_here(self, number: int) -> bool:
        """Say whether this rank reads, and quantizes, the tensor of a layer with this number."""
        return number % self._ranks.num == self._ranks.place.rank

    def broadcast(self, number: int, value: Tensor) -> None:
        """Give all ranks what :meth:`is_read_here` lets one of them read, in place.

        Args:
            value: of the same shape and dtype on all ranks.
        """
        with self._ranks.losses_named():
            for tensor in quantization.stored_tensors(value):
                dist.broadcast(tensor.view(-1).view(torch.uint8), src=number % self._ranks.num)

    def shard(self, layer: nn.Module) -> None:
        """Keep a share of the frozen weights of a loaded layer."""
        linears = [module for module in layer.modules() if isinstance(module, FrozenLinear)]
        for linear in linears:
            if quantization.is_quantized(linear.weight):
                store_apart(linear)
        frozen = {id(parameter) for linear in linears for parameter in linear.parameters(recurse=False)}
        trained = {id(parameter) for parameter in layer.parameters() if parameter.requires_grad}
        whole = {parameter for parameter in layer.parameters() if id(parameter) not in frozen - trained}
        # note: layers are called one by one, so each is a root of its own, and a root keeps its weights after the
        # forward unless it is told not to: all of the base would stand, and no loss would tell.
        fully_shard(layer, mesh=self._mesh, reshard_after_forward=True, ignored_params=whole)


class StoredApart:
    """A linear layer whose quantized weight is put together from parameters of its own whenever it is read."""

    weight_shape: torch.Size
    weight_dtype: torch.dtype
    stored_names: Sequence[str]

    @property
    def weight(self) -> Tensor:
        tensors = [getattr(self, name) for name in self.stored_names]
        return quantization.from_stored_tensors(tensors, self.weight_shape, self.weight_dtype)


def store_apart(linear: FrozenLinear) -> None:
    """Replace a layer's weight by the tensors it is stored in, in place; `weight` is still there to be read."""
    weight = linear.weight
    tensors = {f"stored_{index}": tensor for index, tensor in enumerate(quantization.stored_tensors(weight.data))}
    vars(linear).update(weight_shape=weight.shape, weight_dtype=weight.dtype, stored_names=[*tensors])
    del linear._parameters["weight"]
    for name, tensor in tensors.items():
        if tensor.dim() > 0 and tensor.numel() > 0:
            linear.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        else:  # note: which FSDP2 does not take
            linear.register_buffer(name, tensor, persistent=False)
    kind: Any = type(linear)
    linear.__class__ = _stored_apart(kind)  # as `fully_shard` does with a layer


@functools.cache
def _stored_apart(kind: Any) -> Any:
    return type(kind.__name__, (StoredApart, kind), {})
