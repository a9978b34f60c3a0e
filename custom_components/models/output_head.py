"""The cross-entropy of labels under an output head, without ever holding the logits of all positions.

Dimensions: `P` positions, `C` positions of a chunk, `D` embed_dim, `V` vocab_size.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchtune.modules import TiedLinear

from custom_components.models.lora import LoRALinear
from custom_components.models.token_rows import HeadWithTokenRows, TiedHeadWithTokenRows


def label_losses(hidden_PD: Tensor, output_head: nn.Module | TiedLinear, labels_P: Tensor, chunk_size: int) -> Tensor:
    """Compute each label's loss, its negative log-probability in nats: (P,) in fp32.

    The gradient reaches the hidden states, and what is trained of the head.

    Args:
        hidden_PD: normalized hidden states, before the output head.
        output_head: a model's `output`: a linear layer, tied or not, frozen or trained, with or without an adapter.
        labels_P: the id to predict at each position.
        chunk_size: positions whose logits exist at a time.
    """
    weight_VD = _frozen_weight(output_head)
    if weight_VD is not None:
        return _FrozenHeadLosses.apply(hidden_PD, weight_VD, labels_P, chunk_size)
    losses = [
        checkpoint(_chunk_losses, hidden_CD, output_head, labels_C, use_reentrant=False)
        for hidden_CD, labels_C in zip(hidden_PD.split(chunk_size), labels_P.split(chunk_size), strict=True)
    ]
    return torch.cat(losses)


def log_probability_chunks(
    hidden_PD: Tensor, output_head: Callable[[Tensor], Tensor], chunk_size: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield some positions at a time, and the log-probabilities of all ids there: (C, V) in fp32."""
    for start in range(0, len(hidden_PD), chunk_size):
        chunk = slice(start, start + chunk_size)
        yield chunk, _log_probabilities(hidden_PD[chunk], output_head)


def of_labels(values_CV: Tensor, labels_C: Tensor) -> Tensor:
    """Pick each position's value at its label: (C,)."""
    return values_CV.gather(1, labels_C.unsqueeze(1)).squeeze(1)


def _log_probabilities(hidden_CD: Tensor, output_head: Callable[[Tensor], Tensor]) -> Tensor:
    return output_head(hidden_CD).log_softmax(dim=1, dtype=torch.float32)


def _chunk_losses(hidden_CD: Tensor, output_head: Callable[[Tensor], Tensor], labels_C: Tensor) -> Tensor:
    return -of_labels(_log_probabilities(hidden_CD, output_head), labels_C)


def _frozen_weight(output_head: nn.Module | TiedLinear) -> Tensor | None:
    """Return the weight of a head that has nothing else and is not trained; None for another head."""
    if isinstance(output_head, LoRALinear | HeadWithTokenRows | TiedHeadWithTokenRows):
        return None
    weight_VD = (output_head.tied_module if isinstance(output_head, TiedLinear) else output_head).weight
    assert isinstance(weight_VD, Tensor)
    return None if weight_VD.requires_grad else weight_VD


class _FrozenHeadLosses(torch.autograd.Function):
    """Computes the hidden states' gradient beside the losses, so that no logits wait for the backward.

    d loss / d logits = softmax(logits) - one_hot(label); the head is frozen and gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden_PD: Tensor, weight_VD: Tensor, labels_P: Tensor, chunk_size: int) -> Tensor:
        losses_P = torch.empty(len(hidden_PD), dtype=torch.float32, device=hidden_PD.device)
        grad_PD = torch.empty_like(hidden_PD) if hidden_PD.requires_grad else None
        output_head = partial(F.linear, weight=weight_VD)
        for chunk, log_probabilities_CV in log_probability_chunks(hidden_PD, output_head, chunk_size):
            labels_C = labels_P[chunk]
            losses_P[chunk] = -of_labels(log_probabilities_CV, labels_C)
            if grad_PD is not None:
                grad_logits_CV = log_probabilities_CV.exp_()
                labels_C1 = labels_C.unsqueeze(1)
                grad_logits_CV.scatter_add_(1, labels_C1, torch.full_like(labels_C1, -1, dtype=torch.float32))
                grad_PD[chunk] = grad_logits_CV.to(hidden_PD.dtype) @ weight_VD
        ctx.grad_PD, ctx.chunk_size = grad_PD, chunk_size
        return losses_P

    @staticmethod
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor, None, None, None]:
        grad_PD = torch.empty_like(ctx.grad_PD)
        # A chunk at a time, because the products are in fp32.
        for start in range(0, len(grad_PD), ctx.chunk_size):
            chunk = slice(start, start + ctx.chunk_size)
            grad_PD[chunk] = ctx.grad_PD[chunk] * grad_P[chunk].unsqueeze(1)
        return grad_PD, None, None, None
