"""The gradients of a step, summed over the ranks in one collective."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from custom_components.distributed.ranks import Ranks


class SharedGradients:
    """Keeps the gradients of all trained parameters in one buffer, which stands for the whole run.

    Every gradient is a part of it, so nothing is copied before the sum or after it; DistributedDataParallel is slower
    (benchmarks/README.md), and its broadcast at construction changes a frozen base in NF4.

    Args:
        parameters: in fp32, the same on every rank and in the same order.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
        self._parameters = list(parameters)
        assert all(parameter.dtype is torch.float32 for parameter in self._parameters)
        self._ranks = ranks
        sizes = [parameter.numel() for parameter in self._parameters]
        device = self._parameters[0].device
        self._buffer = torch.zeros(sum(sizes) + 1, dtype=torch.float32, device=device)
        *parts, self._loss = self._buffer.split([*sizes, 1])
        self._gradients = [part.view_as(parameter) for part, parameter in zip(parts, self._parameters, strict=True)]

    def begin(self) -> None:
        """Give every parameter a gradient of zeros, to which the step's backwards add: also a rank without any."""
        self._buffer.zero_()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def summed(self, loss: Tensor) -> Tensor:
        """Sum the gradients over the ranks, in place, and return the sum of their shares of the loss."""
        self._loss.copy_(loss)
        self._ranks.summed(self._buffer)
        return self._loss.squeeze(0).clone()
