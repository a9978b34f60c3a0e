"""Linear layers made ready for inference: those of one input are joined, frozen weights and adapters alike.

Dimensions: `R` rows, `I` in_dim, `O` out_dim of all together, `A` rank of all together.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_components.generation import nf4_gemv
from custom_components.models import nf4_product, quantization
from custom_components.models.lora import FrozenLinear, LoRALinear


class InferenceLinear(nn.Module):
    """Linear layers that share one input, with joined outputs: (R, in_dim) -> (R, out_dim).

    Three products instead of three for each layer, with A and B cast once. `disabled` and `adapter_params` are
    torchtune's protocol for `disable_adapter`.

    Args:
        layers: their frozen weights are moved here; the layers are empty and unusable afterwards.
        dtype: of the inputs.
    """

    low_rank_AI: Tensor | None
    update_AO: Tensor | None
    ratio_O: Tensor | None

    def __init__(self, layers: Sequence[FrozenLinear], dtype: torch.dtype) -> None:
        super().__init__()
        self.disabled = False
        adapters = [layer for layer in layers if isinstance(layer, LoRALinear)]
        self.register_buffer("ratio_O", _output_ratios(layers, dtype), persistent=False)
        self.register_buffer("low_rank_AI", None, persistent=False)
        self.register_buffer("update_AO", None, persistent=False)
        if adapters:
            # On the CPU a product of one row with a matrix this thin costs many times as much in bf16 as in fp32.
            adapter_dtype = dtype if adapters[0].lora_a.weight.is_cuda else adapters[0].lora_a.weight.dtype
            self.low_rank_AI = torch.cat([adapter.down().detach() for adapter in adapters]).to(adapter_dtype)
            self.update_AO = torch.block_diag(*[_scaled_b(layer).T for layer in layers]).to(adapter_dtype).contiguous()
        self.base = _joined_base(layers, dtype)

    def adapter_params(self) -> list[str]:
        """Nothing here is trained."""
        return []

    def forward(self, input_RI: Tensor) -> Tensor:
        base_RO = self.base(input_RI)
        if self.low_rank_AI is None or self.update_AO is None or self.disabled:
            return base_RO
        low_rank_RA = F.linear(input_RI.to(self.low_rank_AI.dtype), self.low_rank_AI)
        output_RO = torch.addmm(base_RO.to(low_rank_RA.dtype), low_rank_RA, self.update_AO)
        if self.ratio_O is not None:
            output_RO = output_RO * self.ratio_O
        return output_RO.to(base_RO.dtype)


def _scaled_b(layer: FrozenLinear) -> Tensor:
    """Give s B of a layer, (out_dim, rank); rank 0 if it has no adapter."""
    if isinstance(layer, LoRALinear):
        return layer.up().detach() * layer.scaling
    return torch.zeros(layer.out_dim, 0, device=layer.weight.device)


def _output_ratios(layers: Sequence[FrozenLinear], dtype: torch.dtype) -> Tensor | None:
    """Give the factor of every output, (O,), if the adapter of some layer has one; None: there is none."""
    ratios = [layer.output_ratio_O(dtype) if isinstance(layer, LoRALinear) else None for layer in layers]
    if all(ratio_O is None for ratio_O in ratios):
        return None
    return torch.cat(
        [
            torch.ones(layer.out_dim, device=layer.weight.device) if ratio_O is None else ratio_O
            for layer, ratio_O in zip(layers, ratios, strict=True)
        ]
    )


class _JoinedLinear(nn.Module):
    """`input @ weight.T` for the rows of several weights."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        joined = [torch.cat(list(weights))] if not any(map(quantization.is_quantized, weights)) else weights
        self.weights = nn.ParameterList(nn.Parameter(weight, requires_grad=False) for weight in joined)

    def forward(self, input_RI: Tensor) -> Tensor:
        outputs = [nf4_product.frozen_product(input_RI, weight) for weight in self.weights]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _joined_base(layers: Sequence[FrozenLinear], dtype: torch.dtype) -> nn.Module:
    weights = [layer.weight.detach() for layer in layers]
    base = nf4_gemv.NF4GemvLinear(weights, dtype) if nf4_gemv.can_multiply(weights, dtype) else _JoinedLinear(weights)
    for layer in layers:
        layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    return base
