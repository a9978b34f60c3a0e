"""A merge compared with base + adapters: logits of the same tokens in fp32, one layer's weights in memory at a time.

Dimensions: `T` tokens of all rows, laid end to end, `D` embed_dim, `V` vocab_size.
"""

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import TiedLinear, TransformerDecoder

from custom_components.export.merged_weights import EMBEDDING, BaseWeights, MergedAdapter, with_token_rows
from custom_components.models.attention import RowLengths
from custom_components.models.lora import FrozenLinear, LoRALinear
from custom_components.runtime.errors import UserError

# The largest relative error of a rounded weight; for q8_0, 8 bits with their sign, of the largest in its block.
ROUNDING = {
    **{"fp32": torch.finfo(torch.float32).eps, "fp16": torch.finfo(torch.float16).eps},
    **{"bf16": torch.finfo(torch.bfloat16).eps, "f16": torch.finfo(torch.float16).eps, "q8_0": 2**-7},
}


@dataclass(frozen=True)
class LogitComparison:
    """The distance between the logits of two models.

    Attributes:
        largest_difference: of two logits.
        largest_logit: of the second model, by absolute value.
        relative_difference: length of the difference of all logits over the length of the second model's.
        same_next_token: share of positions whose likeliest next token is the same.
    """

    largest_difference: float
    largest_logit: float
    relative_difference: float
    same_next_token: float

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.largest_difference:.2g} (logits reach {self.largest_logit:.1f}), "
            f"the same next token at {self.same_next_token:.1%} of the positions"
        )


def compared(logits_TV: Tensor, expected_logits_TV: Tensor) -> LogitComparison:
    """Measure how far `logits_TV` are from those expected."""
    difference_TV = logits_TV - expected_logits_TV
    return LogitComparison(
        difference_TV.abs().max().item(),
        expected_logits_TV.abs().max().item(),
        (difference_TV.norm() / expected_logits_TV.norm()).item(),
        (logits_TV.argmax(-1) == expected_logits_TV.argmax(-1)).float().mean().item(),
    )


class Weights(Protocol):
    """A model on the meta device, and its weights by name."""

    model: TransformerDecoder

    def read(self, name: str) -> Tensor: ...


def check_same_logits(comparison: LogitComparison, storage: str) -> None:
    """Hold a comparison against what rounding the weights can explain.

    Args:
        storage: how the weights are stored, of `ROUNDING`.

    Raises:
        UserError: the merged model is not base + adapters.
    """
    limit = max(1e-4, 16 * ROUNDING[storage])
    if not comparison.relative_difference <= limit:  # so written, it holds for NaN as well
        raise UserError(
            f"output_dir: nothing is written, for the merged model in {storage} is not base + adapter: their logits "
            f"differ by {comparison.relative_difference:.2g} of their length, where rounding explains {limit:.2g}. "
            "Merge with dtype=fp32; where that fails too, the disk or this program is at fault"
        )


def logits_of_weights(weights: Weights, rows: Sequence[Sequence[int]]) -> Tensor:
    """Compute the logits of a checkpoint's model: (T, V), on the CPU."""
    return _streamed_logits(weights.model, weights.read, rows)


def logits_with_adapters(base: BaseWeights, adapters: Sequence[MergedAdapter], rows: Sequence[Sequence[int]]) -> Tensor:
    """Compute the logits of a base with adapters beside it, not merged: (T, V), on the CPU."""
    model = copy.deepcopy(base.model)
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.modules):
        of_this_module = [(a.weight, a.modules[name]) for a in adapters if name in a.modules]
        parent_name, _, child_name = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child_name, AdapterSum(of_this_module))
    is_tied = base.shape.tied_embeddings
    if is_tied and any("output" in adapter.token_rows for adapter in adapters):
        with torch.device("meta"):
            model.output = FrozenLinear(base.shape.embed_dim, base.shape.vocab_size)

    def read(name: str) -> Tensor:
        return with_token_rows(name, base.read(name), adapters, is_tied=is_tied)

    return _streamed_logits(model, read, rows)


class AdapterSum(nn.Module):
    """A linear layer with the changes of several adapters, each times its factor.

    Args:
        adapters: factor and adapter; all of the same frozen weight.
    """

    def __init__(self, adapters: Sequence[tuple[float, LoRALinear]]) -> None:
        super().__init__()
        self.factors = [factor for factor, _ in adapters]
        self.adapters = nn.ModuleList(adapter for _, adapter in adapters)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_dim) -> (..., out_dim)."""
        first = self.adapters[0]
        assert isinstance(first, LoRALinear)
        if self.factors == [1.0]:
            return first(input)
        plain = first.plain_output(input)
        changes = [
            factor * (adapter(input) - plain) for factor, adapter in zip(self.factors, self.adapters, strict=True)
        ]
        return plain + torch.stack(changes).sum(dim=0)


@torch.inference_mode()
def _streamed_logits(model: TransformerDecoder, read: Callable[[str], Tensor], rows: Sequence[Sequence[int]]) -> Tensor:
    lengths = RowLengths(tuple(map(len, rows)))
    positions_1T = torch.cat([torch.arange(length) for length in lengths.lengths]).unsqueeze(0)
    embedding_VD = read(EMBEDDING)
    hidden_1TD = embedding_VD[torch.tensor([[token for row in rows for token in row]])].float()
    for index, layer in enumerate(model.layers):
        layer_with_weights = _with_weights(layer, f"layers.{index}", read)
        hidden_1TD = layer_with_weights(hidden_1TD, mask=lengths, input_pos=positions_1T)
    hidden_TD = _with_weights(model.norm, "norm", read)(hidden_1TD).squeeze(0)
    if isinstance(model.output, TiedLinear):
        return F.linear(hidden_TD, embedding_VD.float())
    return _with_weights(model.output, "output", read)(hidden_TD)


def _with_weights(module: nn.Module, prefix: str, read: Callable[[str], Tensor]) -> nn.Module:
    """Copy a module and read its frozen weights, which are on the meta device, in fp32."""
    module = copy.deepcopy(module)
    values: dict[str, nn.Parameter] = {}
    for name, submodule in module.named_modules():
        for parameter_name, parameter in list(submodule.named_parameters(recurse=False)):
            if parameter.is_meta:
                # The adapters of an AdapterSum share the weight of the layer in whose place it is.
                full_name = re.sub(r"\.adapters\.\d+", "", ".".join(filter(None, (prefix, name, parameter_name))))
                if full_name not in values:
                    values[full_name] = nn.Parameter(read(full_name).float(), requires_grad=False)
                setattr(submodule, parameter_name, values[full_name])
        if isinstance(submodule, LoRALinear):
            submodule.base_changed()
    return module
