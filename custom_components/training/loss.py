"""Cross-entropy of the supervised positions, without ever holding the logits of a whole batch.

Dimensions: `P` supervised positions, `C` positions of a chunk, `D` embed_dim, `V` vocab_size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchtune.modules import TiedLinear

from custom_components.models.lora import LoRALinear


class LinearCrossEntropy:
    """Output head and cross-entropy in one, over chunks of supervised positions.

    Args:
        chunk_size: positions whose logits exist at a time. More: slightly faster, more memory.
    """

    def __init__(self, chunk_size: PositiveInt = 512) -> None:
        self.chunk_size = chunk_size

    def __call__(self, hidden_PD: Tensor, output_head: nn.Module | TiedLinear, labels_P: Tensor) -> Tensor:
        """The summed loss in fp32, a scalar; its gradient reaches the hidden states (and the head's adapter).

        Args:
            hidden_PD: normalized hidden states, before the output head.
            output_head: the model's `output`: a frozen linear layer, tied or not, with or without an adapter.
            labels_P: the id to predict at each position.
        """
        if not isinstance(output_head, LoRALinear):
            weight_VD = (output_head.tied_module if isinstance(output_head, TiedLinear) else output_head).weight
            return _FrozenHeadCrossEntropy.apply(hidden_PD, weight_VD, labels_P, self.chunk_size)
        total = hidden_PD.new_zeros((), dtype=torch.float32)
        for hidden_CD, labels_C in zip(hidden_PD.split(self.chunk_size), labels_P.split(self.chunk_size), strict=True):
            total = total + checkpoint(_chunk_loss, hidden_CD, output_head, labels_C, use_reentrant=False)
        return total


def _chunk_loss(hidden_CD: Tensor, output_head: Callable[[Tensor], Tensor], labels_C: Tensor) -> Tensor:
    return F.cross_entropy(output_head(hidden_CD).float(), labels_C, reduction="sum")


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    """Computes the hidden states' gradient beside the loss, so that no logits wait for the backward.

    d loss / d logits = softmax(logits) - one_hot(label); the head is frozen and gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden_PD: Tensor, weight_VD: Tensor, labels_P: Tensor, chunk_size: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden_PD.device)
        needs_gradient = hidden_PD.requires_grad
        grad_PD = torch.empty_like(hidden_PD) if needs_gradient else None
        for start in range(0, len(hidden_PD), chunk_size):
            chunk = slice(start, start + chunk_size)
            labels_C1 = labels_P[chunk].unsqueeze(1)
            logits_CV = F.linear(hidden_PD[chunk], weight_VD)
            log_probabilities_CV = logits_CV.log_softmax(dim=1, dtype=torch.float32)
            total -= log_probabilities_CV.gather(1, labels_C1).sum()
            if grad_PD is not None:
                grad_logits_CV = log_probabilities_CV.exp_()
                grad_logits_CV.scatter_add_(1, labels_C1, torch.full_like(labels_C1, -1, dtype=torch.float32))
                grad_PD[chunk] = grad_logits_CV.to(hidden_PD.dtype) @ weight_VD
        ctx.grad_PD = grad_PD
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None, None, None]:
        return (ctx.grad_PD * grad_total).to(ctx.grad_PD.dtype), None, None, None
