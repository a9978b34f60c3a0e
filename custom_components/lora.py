"""A frozen linear layer, NF4 or not, and the same with a low-rank adapter.

LoRA: Hu et al. 2021, arXiv 2106.09685, section 4.1: W x + (alpha / r) B A x, with A random and B zero at the start.

Dimensions: `I` in_dim, `O` out_dim, `R` rank.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.training.precision import PRECISION_STR_TO_DTYPE

from custom_components import nf4


class FrozenLinear(nn.Module):
    """A linear layer without bias whose weight is never trained.

    Args:
        in_dim, out_dim: the weight's shape is (out_dim, in_dim).
        quantize_base: keep the weight in NF4. It is quantized at once where it has values, and on the meta device by
            whoever loads them (see `checkpoint_loading`).

    Raises:
        AssertionError: if `quantize_base` is set for a shape that does not divide into NF4 blocks.
    """

    def __init__(self, in_dim: int, out_dim: int, *, quantize_base: bool = False) -> None:
        super().__init__()
        assert not quantize_base or nf4.can_quantize((out_dim, in_dim)), (out_dim, in_dim)
        self.in_dim = in_dim
        self.out_dim = out_dim
        self.quantize_base = quantize_base
        weight = torch.empty(out_dim, in_dim)
        if not weight.is_meta:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            weight = nf4.quantize(weight) if quantize_base else weight
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_dim) -> (..., out_dim)."""
        return nf4.linear(input, self.weight)


class LoRALinear(FrozenLinear):
    """A frozen linear layer plus a trained low-rank update, torchtune's `LoRALinear` with fp32 adapters.

    Args:
        in_dim, out_dim: as in :class:`FrozenLinear`.
        rank: R, the inner dimension of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: probability of dropping an input of the update while training.
        quantize_base: keep the frozen weight in NF4.
        adapter_dtype: dtype of the adapter's parameters, and so of the optimizer's state. They are cast to the input's
            dtype for the products. "fp32" whatever the compute dtype: in bf16 small updates round away.

    `lora_a.weight` is (rank, in_dim), `lora_b.weight` is (out_dim, rank).
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        *,
        quantize_base: bool = False,
        adapter_dtype: str = "fp32",
    ) -> None:
        super().__init__(in_dim, out_dim, quantize_base=quantize_base)
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.disabled = False  # set for a while by torchtune's `disable_adapter`
        dtype = PRECISION_STR_TO_DTYPE[adapter_dtype]
        self.lora_a = nn.Linear(in_dim, rank, bias=False, dtype=dtype)
        self.lora_b = nn.Linear(rank, out_dim, bias=False, dtype=dtype)
        self.initialize_parameters()

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def initialize_parameters(self) -> None:
        """A as PEFT and torchtune draw it, B zero: the first output is the base's."""
        nn.init.kaiming_uniform_(self.lora_a.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b.weight)

    def adapter_params(self) -> list[str]:
        """torchtune's AdapterModule protocol: the names of the trained parameters."""
        return ["lora_a.weight", "lora_b.weight"]

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_dim) -> (..., out_dim)."""
        return lora_linears(input, (self,))[0]

    def update(self, low_rank: Tensor) -> Tensor:
        """The scaled update of A's product with the input: (..., rank) -> (..., out_dim)."""
        return F.linear(low_rank * self.scaling, self.lora_b.weight.to(low_rank.dtype))


def lora_linears(input: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
    """The outputs of linear layers that share one input, with one product for the A of all that have an adapter.

    Args:
        input: (..., I).
        layers: :class:`LoRALinear` or any other module from input to output. Layers with the same dropout share one
            dropped input: the projections of one input, as if they were one wide layer.
    """
    outputs = [nf4.linear(input, layer.weight) if isinstance(layer, LoRALinear) else layer(input) for layer in layers]
    adapted = {
        index: layer for index, layer in enumerate(layers) if isinstance(layer, LoRALinear) and not layer.disabled
    }
    if not adapted:
        return outputs
    adapters = list(adapted.values())
    dropout = adapters[0].dropout
    assert all(adapter.dropout == dropout for adapter in adapters)
    dropped = F.dropout(input, dropout, adapters[0].training)
    a_weights = [adapter.lora_a.weight for adapter in adapters]
    a_weight = a_weights[0] if len(a_weights) == 1 else torch.cat(a_weights)
    low_ranks = F.linear(dropped, a_weight.to(input.dtype)).split([adapter.rank for adapter in adapters], dim=-1)
    for index, adapter, low_rank in zip(adapted, adapters, low_ranks, strict=True):
        outputs[index] = outputs[index] + adapter.update(low_rank)
    return outputs
