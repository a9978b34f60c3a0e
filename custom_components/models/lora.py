"""A frozen linear layer, NF4 or not, and the same with a low-rank adapter.

LoRA: Hu et al. 2021, arXiv 2106.09685, section 4.1: W x + s B A x, s = alpha / r, A random and B zero at the start.
rsLoRA: Kalajdzievski 2023, arXiv 2312.03732: s = alpha / sqrt(r), with which the update does not shrink as r grows.
DoRA: Liu et al. 2024, arXiv 2402.09353, section 4: the rows of W + s B A are brought to learned lengths, the magnitude.
LoRA+: Hayou et al. 2024, arXiv 2402.12354: B learns at a higher rate than A.

Dimensions: `I` in_dim, `O` out_dim, `R` rank.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.training.precision import PRECISION_STR_TO_DTYPE

from custom_components.models import nf4, nf4_product


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
        return nf4_product.linear(input, self.weight)


class LoRALinear(FrozenLinear):
    """A frozen linear layer plus a trained low-rank update, torchtune's `LoRALinear` with fp32 adapters.

    Args:
        in_dim, out_dim: as in :class:`FrozenLinear`.
        rank: R, the inner dimension of the update.
        alpha: the update is scaled by alpha / rank, or alpha / sqrt(rank).
        dropout: probability of dropping an input of the update while training.
        quantize_base: keep the frozen weight in NF4.
        adapter_dtype: dtype of the adapter's parameters, and so of the optimizer's state. They are cast to the input's
            dtype for the products. "fp32" whatever the compute dtype: in bf16 small updates round away.
        use_rslora: scale by alpha / sqrt(rank).
        use_dora: learn the length of the weight's rows apart from their direction.

    `lora_a.weight` is (rank, in_dim), `lora_b.weight` is (out_dim, rank), DoRA's `magnitude` is (out_dim,).
    """

    magnitude: nn.Parameter
    base_squared_norms: Tensor

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
        use_rslora: bool = False,
        use_dora: bool = False,
    ) -> None:
        super().__init__(in_dim, out_dim, quantize_base=quantize_base)
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.use_rslora = use_rslora
        self.use_dora = use_dora
        self.disabled = False  # set for a while by torchtune's `disable_adapter`
        dtype = PRECISION_STR_TO_DTYPE[adapter_dtype]
        self.lora_a = nn.Linear(in_dim, rank, bias=False, dtype=dtype)
        self.lora_b = nn.Linear(rank, out_dim, bias=False, dtype=dtype)
        self.initialize_parameters()
        if use_dora:
            self.register_buffer("base_squared_norms", None, persistent=False)
            self.initialize_dora_magnitude()

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def initialize_parameters(self) -> None:
        """A as PEFT and torchtune draw it, B zero: the first output is the base's."""
        nn.init.kaiming_uniform_(self.lora_a.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b.weight)

    @torch.no_grad()
    def initialize_dora_magnitude(self) -> None:
        """The lengths of the frozen weight's rows: the first output is the base's.

        torchtune's protocol. To be called whenever the frozen weight gets other values, before an optimizer takes
        the parameters.
        """
        weight = nf4.dequantize(self.weight, self.weight.dtype) if nf4.is_quantized(self.weight) else self.weight
        self.base_squared_norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        # As `row_norms` takes the root, so that the first ratio of the two is exactly 1.
        self.magnitude = nn.Parameter(self.base_squared_norms.sqrt().to(self.lora_a.weight.dtype))

    def adapter_params(self) -> list[str]:
        """torchtune's AdapterModule protocol: the names of the trained parameters."""
        return ["lora_a.weight", "lora_b.weight"] + (["magnitude"] if self.use_dora else [])

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_dim) -> (..., out_dim)."""
        return lora_linears(input, (self,))[0]

    def plain_output(self, input: Tensor) -> Tensor:
        """The frozen layer's: (..., in_dim) -> (..., out_dim)."""
        return nf4_product.linear(input, self.weight)

    def adapted_output(self, input: Tensor, low_rank: Tensor) -> Tensor:
        """The layer's output, (..., out_dim), for the input and A's product with it, (..., rank)."""
        if not self.use_dora:
            # The update first, because the backward needs its tensors and none of the frozen product's: recomputing a
            # layer ends with the last tensor that is needed, and so leaves out its last frozen product.
            update = self._update(low_rank)
            return self.plain_output(input).add_(update, alpha=self.scaling)
        # W x and W A^T, which the norms need, in one product: NF4 is dequantized once.
        rows = torch.cat([input.reshape(-1, self.in_dim), self.lora_a.weight.detach().to(input.dtype)])
        base, base_of_a_RO = self.plain_output(rows).split([len(rows) - self.rank, self.rank])
        base = base.view(*input.shape[:-1], self.out_dim)
        output = torch.add(base, self._update(low_rank), alpha=self.scaling)
        ratio_O = self.magnitude / self.row_norms(base_of_a_RO)
        # The difference to 1, because bf16 has no steps finer than 1/256 around 1 itself.
        return torch.addcmul(output, output, (ratio_O - 1).to(output.dtype))

    def _update(self, low_rank: Tensor) -> Tensor:
        """B low_rank, (..., out_dim)."""
        # B is laid out as (rank, out_dim) by the cast: its gradient is then a product in half the time on the CPU.
        b_RO = self.lora_b.weight.T.to(low_rank.dtype, memory_format=torch.contiguous_format)
        return low_rank @ b_RO

    @torch.no_grad()
    def row_norms(self, base_of_a_RO: Tensor) -> Tensor:
        """The lengths of the rows of W + s B A, (out_dim,), in fp32 and without building that sum.

        ||w + s b A||^2 = ||w||^2 + 2 s b . (A w) + s^2 b (A A^T) b for a row w of W and its row b of B. They are
        constants of the backward (section 4.3 of the paper).

        Args:
            base_of_a_RO: A W^T.
        """
        a_RI = self.lora_a.weight.to(base_of_a_RO.dtype).float()
        scaled_b_OR = self.lora_b.weight.float() * self.scaling
        change_O = (scaled_b_OR * (2 * base_of_a_RO.float().T + scaled_b_OR @ (a_RI @ a_RI.T))).sum(dim=1)
        # A row of zeros, as of a padded vocabulary, stays one: its magnitude is 0, and 0 over this is 0.
        return (self.base_squared_norms + change_O).clamp(min=torch.finfo(torch.float32).tiny).sqrt()


def lora_linears(input: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
    """The outputs of linear layers that share one input, with one product for the A of all that have an adapter.

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
    """The product of every adapter's A with the dropped input: (..., rank) each."""
    dropout = adapters[0].dropout
    assert all(adapter.dropout == dropout for adapter in adapters)
    dropped = F.dropout(input, dropout, adapters[0].training)
    a_weights = [adapter.lora_a.weight for adapter in adapters]
    a_weight = a_weights[0] if len(a_weights) == 1 else torch.cat(a_weights)
    return F.linear(dropped, a_weight.to(input.dtype)).split([adapter.rank for adapter in adapters], dim=-1)


def adapter_modules(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's modules with an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@torch.no_grad()
def merged_weight(base_OI: Tensor, adapters: Sequence[tuple[float, LoRALinear]]) -> Tensor:
    """A weight with the changes of adapters, each times its factor, in fp32: (out_dim, in_dim)."""
    base_OI = base_OI.float()
    merged_OI = base_OI.clone()
    for factor, adapter in adapters:
        a_RI, b_OR = adapter.lora_a.weight.float(), adapter.lora_b.weight.float()
        if not adapter.use_dora:
            merged_OI.addmm_(b_OR, a_RI, alpha=factor * adapter.scaling)
            continue
        changed_OI = torch.addmm(base_OI, b_OR, a_RI, alpha=adapter.scaling)
        norms_O = torch.linalg.vector_norm(changed_OI, dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        changed_OI.mul_((adapter.magnitude.float() / norms_O).unsqueeze(1))
        merged_OI.add_(changed_OI.sub_(base_OI), alpha=factor)
    return merged_OI
