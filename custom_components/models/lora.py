"""A frozen linear layer, quantized or not, and the same with a low-rank adapter.

LoRA: Hu et al. 2021, arXiv 2106.09685, section 4.1: W x + s B A x, s = alpha / r, A random and B zero at the start.
rsLoRA: Kalajdzievski 2023, arXiv 2312.03732: s = alpha / sqrt(r), with which the update does not shrink as r grows.
LoRA+: Hayou et al. 2024, arXiv 2402.12354: B learns at a higher rate than A.

Another variant of LoRA is a subclass of :class:`LoRALinear` that overrides what differs in an adapter's life, as
:class:`~custom_components.models.dora.DoRALinear` and :class:`~custom_components.models.pissa.PiSSALinear` do:
initialization, forward, merging, inference, what is on disk, names in PEFT.

Dimensions: `I` in_dim, `O` out_dim, `R` rank.
"""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.training.precision import PRECISION_STR_TO_DTYPE

from custom_components.models import nf4_product
from custom_components.models.quantization import Quantization, can_quantize, chosen_quantization, quantize


class FrozenLinear(nn.Module):
    """A linear layer without bias whose weight is never trained.

    Args:
        in_dim, out_dim: the weight's shape is (out_dim, in_dim).
        quantize_base: keep the weight in NF4. A weight with values is quantized at once; one on the meta device is
            quantized when it is loaded (see `checkpoint_loading`).
        quantization: the format to keep it in, see :func:`chosen_quantization`.
        weight: the parameter of another module, to share; None: the layer has its own.

    Raises:
        AssertionError: for a shape that the format cannot hold: NF4 has blocks.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        quantize_base: bool = False,
        quantization: str | None = None,
        weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.out_dim = out_dim
        self.quantization: Quantization | None = chosen_quantization(quantize_base, quantization)
        shape = (out_dim, in_dim)
        assert self.quantization is None or can_quantize(shape, self.quantization), shape
        if weight is None:
            values = torch.empty(out_dim, in_dim)
            if not values.is_meta:
                nn.init.kaiming_uniform_(values, a=math.sqrt(5))
                values = values if self.quantization is None else quantize(values, self.quantization)
            weight = nn.Parameter(values, requires_grad=False)
        self.weight = weight

    @property
    def quantize_base(self) -> bool:
        """Whether the weight is kept in another format than the compute dtype's."""
        return self.quantization is not None

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_dim) -> (..., out_dim)."""
        return self.plain_output(input)

    def plain_output(self, input: Tensor) -> Tensor:
        """Multiply by the frozen weight alone: (..., in_dim) -> (..., out_dim)."""
        return nf4_product.frozen_product(input, self.weight)


class LoRALinear(FrozenLinear):
    """A frozen linear layer plus a trained low-rank update, torchtune's `LoRALinear` with fp32 adapters.

    Args:
        in_dim, out_dim: as in :class:`FrozenLinear`.
        rank: R, the inner dimension of the update.
        alpha: the update is scaled by alpha / rank, or alpha / sqrt(rank).
        dropout: probability of dropping an input of the update while training.
        quantize_base, quantization, weight: as in :class:`FrozenLinear`.
        adapter_dtype: dtype of the adapter's parameters, and so of the optimizer's state. They are cast to the input's
            dtype for the products. None: torch's default dtype, which is fp32 whatever the compute dtype, because in
            bf16 small updates round away. torchtune's recipes build models under their own `dtype`, and want it here.
        use_rslora: scale by alpha / sqrt(rank).

    `lora_a.weight` is (rank, in_dim), `lora_b.weight` is (out_dim, rank).
    """

    # The trained parameters, and PEFT's names of them.
    peft_names: ClassVar[Mapping[str, str]] = {"lora_a.weight": "lora_A.weight", "lora_b.weight": "lora_B.weight"}

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        *,
        quantize_base: bool = False,
        quantization: str | None = None,
        weight: Tensor | None = None,
        adapter_dtype: str | None = None,
        use_rslora: bool = False,
    ) -> None:
        super().__init__(in_dim, out_dim, quantize_base=quantize_base, quantization=quantization, weight=weight)
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.use_rslora = use_rslora
        self.disabled = False  # set inside torchtune's `disable_adapter`
        dtype = None if adapter_dtype is None else PRECISION_STR_TO_DTYPE[adapter_dtype]
        self.lora_a = nn.Linear(in_dim, rank, bias=False, dtype=dtype)
        self.lora_b = nn.Linear(rank, out_dim, bias=False, dtype=dtype)
        self.initialize_parameters()

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def adapter_params(self) -> list[str]:
        """Name the trained parameters; torchtune's AdapterModule protocol."""
        return list(self.peft_names)

    @property
    def peft_flags(self) -> dict[str, bool]:
        """Name the variant as PEFT's config and the builders' arguments do; plain LoRA has no flag."""
        return {"use_rslora": True} if self.use_rslora else {}

    @property
    def exported_rank(self) -> int:
        """The rank of the adapter on disk."""
        return self.rank

    @property
    def exported_alpha(self) -> float:
        """The alpha of the adapter on disk."""
        return self.alpha

    def exported(self, parameter: str) -> Tensor:
        """Give what a trained parameter is on disk."""
        return self.get_parameter(parameter)

    def load_exported(self, parameter: str, values: Tensor) -> None:
        """Take the values of :meth:`exported` back, in place."""
        self.get_parameter(parameter).copy_(values)

    def has_learned(self) -> bool:
        """Tell whether the adapter changes anything."""
        return bool(self.lora_b.weight.any())

    def down(self) -> Tensor:
        """Give the first matrix of the update, (R, I): A."""
        return self.lora_a.weight

    def up(self) -> Tensor:
        """Give the second matrix of the update, (O, R): B."""
        return self.lora_b.weight

    def initialize_parameters(self) -> None:
        """Draw A as PEFT and torchtune draw it and set B to zero, so that the first output is the base's."""
        nn.init.kaiming_uniform_(self.lora_a.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b.weight)

    def allocate_adapter(self, device: torch.device) -> None:
        """Give the trained parameters memory on `device`, without values."""
        self.lora_a.to_empty(device=device)
        self.lora_b.to_empty(device=device)

    def initialize_adapter(self, device: torch.device) -> None:
        """Give the trained parameters of a layer with a loaded weight their first values, on `device`.

        They are drawn on the CPU, so that they are the same on every device.
        """
        self.allocate_adapter(torch.device("cpu"))
        self.initialize_parameters()
        self.lora_a.to(device)
        self.lora_b.to(device)

    def base_changed(self) -> None:
        """Take note of new values in the frozen weight; what was learned stays. LoRA keeps nothing of the weight.

        Call it after writing them in place; our loader and `load_state_dict` do.
        """

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_dim) -> (..., out_dim)."""
        return lora_linears(input, (self,))[0]

    def adapted_output(self, input: Tensor, low_rank: Tensor) -> Tensor:
        """Compute the layer's output, (..., out_dim), from the input and A's product with it, (..., rank)."""
        # Compute the update before the frozen product: recomputation stops at the last tensor the backward needs, so a
        # layer's final product is never repeated.
        update = self.update(low_rank)
        return self.plain_output(input).add_(update, alpha=self.scaling)

    def update(self, low_rank: Tensor) -> Tensor:
        """Multiply by B: (..., rank) -> (..., out_dim)."""
        # The cast lays B out as (rank, out_dim): on the CPU the product for its gradient then takes half the time.
        b_RO = self.up().T.to(low_rank.dtype, memory_format=torch.contiguous_format)
        return low_rank @ b_RO

    def output_ratio_O(self, dtype: torch.dtype) -> Tensor | None:
        """Return the factor of each output of W + s B A, (out_dim,), in inference; None: there is none.

        Args:
            dtype: of the inputs.
        """
        return None

    def add_change(self, merged_OI: Tensor, base_OI: Tensor, factor: float) -> None:
        """Add the adapter's change of a frozen weight `base_OI`, times `factor`, to `merged_OI`, in place, in fp32."""
        merged_OI.addmm_(self.up().float(), self.down().float(), alpha=factor * self.scaling)


def lora_linears(input: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
    """Compute linear layers that share one input, with one product for the A of all that have an adapter.

    Args:
        input: (..., I).
        layers: :class:`LoRALinear` or any other module from input to output. Layers with the same dropout share one
            dropped input: the projections of one input, as if they were one wide layer.
    """
    adapters = [layer for layer in layers if isinstance(layer, LoRALinear) and not layer.disabled]
    low_ranks = iter(_low_ranks(input, adapters) if adapters else ())
    outputs = []
    for layer in layers:
        if not isinstance(layer, LoRALinear):
            outputs.append(layer(input))
        elif layer.disabled:
            outputs.append(layer.plain_output(input))
        else:
            outputs.append(layer.adapted_output(input, next(low_ranks)))
    return outputs


def _low_ranks(input: Tensor, adapters: Sequence[LoRALinear]) -> Sequence[Tensor]:
    """Multiply the dropped input by every adapter's A: (..., rank) each."""
    dropout = adapters[0].dropout
    assert all(adapter.dropout == dropout for adapter in adapters)
    dropped = F.dropout(input, dropout, adapters[0].training)
    a_weights = [adapter.down() for adapter in adapters]
    a_weight = a_weights[0] if len(a_weights) == 1 else torch.cat(a_weights)
    return F.linear(dropped, a_weight.to(input.dtype)).split([len(a_weight) for a_weight in a_weights], dim=-1)


def adapter_modules(model: nn.Module) -> dict[str, LoRALinear]:
    """List the model's modules with an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@torch.no_grad()
def merged_weight(base_OI: Tensor, adapters: Sequence[tuple[float, LoRALinear]]) -> Tensor:
    """Add the changes of adapters, each times its factor, to a weight, in fp32: (out_dim, in_dim)."""
    base_OI = base_OI.float()
    merged_OI = base_OI.clone()
    for factor, adapter in adapters:
        adapter.add_change(merged_OI, base_OI, factor)
    return merged_OI
