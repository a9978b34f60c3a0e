"""A transformer layer that keeps its input only, and computes all but attention a piece of tokens at a time.

Norms, projections and feed-forward work on each token alone, so what they need for the backward exists for one piece
only. Of all tokens at once there are, while the backward is in the layer: its input, queries, keys, values, attention's
output, and their gradients.

Dimensions: `T` tokens, `D` embed_dim, `N` query heads, `K` key/value heads, `H` head_dim.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from custom_components.models.attention import RowLengths, attend_within_rows
from custom_components.models.nf4_product import FROZEN_VALUES

T = TypeVar("T")
# Fewer tokens would dequantize every weight more often than that costs little; more take more memory.
PIECE_TOKENS = 4096


class LayerInputs(Protocol):
    """Where layers keep their inputs between forward and backward."""

    def put(self, input_1TD: Tensor) -> Any:
        """Keep a layer's input; return what :meth:`take` wants."""

    def take(self, kept: Any) -> Tensor:
        """Give the input back, once: (1, T, D)."""


class _KeptInPlace:
    def put(self, input_1TD: Tensor) -> Tensor:
        return input_1TD

    def take(self, kept: Tensor) -> Tensor:
        return kept


KEPT_IN_PLACE: LayerInputs = _KeptInPlace()


@dataclass(frozen=True)
class _Call:
    """What a layer is called with besides its input."""

    layer: nn.Module
    rows: RowLengths
    positions_1T: Tensor
    piece_tokens: int

    @property
    def before_attention(self) -> Callable[..., tuple[Tensor, ...]]:
        return _compiled(_before_attention) if self._is_compiled else _before_attention

    @property
    def after_attention(self) -> Callable[..., Tensor]:
        return _compiled(_after_attention) if self._is_compiled else _after_attention

    @property
    def _is_compiled(self) -> bool:
        """Whether the layer is: `compile` leaves the compiled call there."""
        return self.layer._compiled_call_impl is not None

    def pieces(self) -> Iterator[slice]:
        num_tokens = self.positions_1T.shape[1]
        for start in range(0, num_tokens, self.piece_tokens):
            yield slice(start, min(start + self.piece_tokens, num_tokens))


@cache
def _compiled(function: Callable[..., T]) -> Callable[..., T]:
    # note: dynamic from the start, because every batch has another number of tokens.
    return torch.compile(function, dynamic=True)


def layer_in_pieces(
    layer: nn.Module, input_1TD: Tensor, rows: RowLengths, positions_1T: Tensor, piece_tokens: int = PIECE_TOKENS
) -> Tensor:
    """Compute a layer, (1, T, D), as :func:`recomputed_layer` does, and let autograd keep what it needs."""
    call = _Call(layer, rows, positions_1T, piece_tokens)
    attended_1TNH = _attended(call, [torch.cat(heads, dim=1) for heads in zip(*_heads(call, input_1TD), strict=True)])
    outputs = [_after_attention(layer, attended_1TNH[:, piece], input_1TD[:, piece]) for piece in call.pieces()]
    return torch.cat(outputs, dim=1)


def recomputed_layer(
    layer: nn.Module,
    input_1TD: Tensor,
    rows: RowLengths,
    positions_1T: Tensor,
    inputs: LayerInputs,
    piece_tokens: int = PIECE_TOKENS,
) -> Tensor:
    """Compute a layer that keeps nothing but its input for the backward: (1, T, D).

    Args:
        layer: torchtune's TransformerSelfAttentionLayer with our attention and feed-forward.
        rows, positions_1T: as for the layer itself.
        inputs: keeps the layer's input.
        piece_tokens: of a piece. Dropout draws for one piece after the other.
    """
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return _RecomputedLayer.apply(input_1TD, _Call(layer, rows, positions_1T, piece_tokens), inputs, trained, *trained)


class _RecomputedLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input_1TD: Tensor,
        call: _Call,
        inputs: LayerInputs,
        trained: Sequence[nn.Parameter],
        *_trained: Tensor,
    ) -> Tensor:
        ctx.call, ctx.inputs, ctx.trained, ctx.random = call, inputs, trained, _RandomState(input_1TD.device)
        attended_1TNH = _attended(call, _whole(call, _heads(call, input_1TD)))
        output_1TD = torch.empty_like(input_1TD)
        for piece in call.pieces():
            output_1TD[:, piece] = call.after_attention(call.layer, attended_1TNH[:, piece], input_1TD[:, piece])
        ctx.kept = inputs.put(input_1TD)
        return output_1TD

    @staticmethod
    def backward(ctx: Any, grad_output_1TD: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        needs_input_grad = ctx.needs_input_grad[0]
        input_1TD = ctx.inputs.take(ctx.kept)
        gradients = _TrainedGradients(ctx.trained)
        grad_input_1TD = torch.zeros_like(input_1TD)
        with ctx.random.set_back():
            heads = [tensor.requires_grad_() for tensor in _whole(call, _heads(call, input_1TD))]
            with torch.enable_grad():
                attended_1TNH = _attended(call, heads)
            edge, attended_1TNH = get_gradient_edge(attended_1TNH), attended_1TNH.detach()
            grad_attended_1TNH = torch.zeros_like(attended_1TNH)
            for piece in call.pieces():
                attended_1CNH = attended_1TNH[:, piece].requires_grad_()
                input_1CD = input_1TD[:, piece].detach().requires_grad_(needs_input_grad)
                with torch.enable_grad():
                    output_1CD = call.after_attention(call.layer, attended_1CNH, input_1CD, for_gradients_only=True)
                gradients.add(
                    [(output_1CD, grad_output_1TD[:, piece])],
                    [(attended_1CNH, grad_attended_1TNH[:, piece]), (input_1CD, grad_input_1TD[:, piece])],
                )
        del attended_1TNH, attended_1CNH, output_1CD
        grad_heads = torch.autograd.grad(edge, heads, grad_attended_1TNH)
        del heads, edge, grad_attended_1TNH
        with ctx.random.set_back():
            for piece in call.pieces():
                input_1CD = input_1TD[:, piece].detach().requires_grad_(needs_input_grad)
                with torch.enable_grad(), FROZEN_VALUES.needed(False):
                    heads_of_piece = call.before_attention(call.layer, input_1CD, call.positions_1T[:, piece])
                grads_of_piece = [grad[:, piece] for grad in grad_heads]
                gradients.add(
                    list(zip(heads_of_piece, grads_of_piece, strict=True)), [(input_1CD, grad_input_1TD[:, piece])]
                )
        return (grad_input_1TD if needs_input_grad else None), None, None, None, *gradients.sums


def _before_attention(layer: Any, input_1CD: Tensor, positions_1C: Tensor) -> tuple[Tensor, ...]:
    """Compute queries, keys and values of some tokens: (1, C, N or K, H)."""
    return layer.attn.heads(layer.sa_norm(input_1CD), positions_1C)


def _heads(call: _Call, input_1TD: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield queries, keys and values of each piece: (1, C, N or K, H)."""
    for piece in call.pieces():
        yield call.before_attention(call.layer, input_1TD[:, piece], call.positions_1T[:, piece])


def _whole(call: _Call, parts: Iterator[tuple[Tensor, ...]]) -> list[Tensor]:
    """Join tensors of pieces as they come, so that one piece is there twice and not all: (1, T, ...) each."""
    num_tokens = call.positions_1T.shape[1]
    wholes: list[Tensor] = []
    for piece, tensors in zip(call.pieces(), parts, strict=True):
        wholes = wholes or [tensor.new_empty(1, num_tokens, *tensor.shape[2:]) for tensor in tensors]
        for whole, tensor in zip(wholes, tensors, strict=True):
            whole[:, piece] = tensor
    return wholes


def _attended(call: _Call, heads: Sequence[Tensor]) -> Tensor:
    """Compute attention's output before its projection: (1, T, N, H)."""
    query_1NTH, key_1KTH, value_1KTH = (tensor.transpose(1, 2) for tensor in heads)
    return attend_within_rows(query_1NTH, key_1KTH, value_1KTH, call.rows).transpose(1, 2)


def _after_attention(
    layer: Any, attended_1CNH: Tensor, input_1CD: Tensor, *, for_gradients_only: bool = False
) -> Tensor:
    """Compute some tokens' output of a layer, (1, C, D); or only what its gradients need, and an output without values.

    The layer's last product is what no gradient needs.
    """
    middle_1CD = layer.attn.output_proj(attended_1CNH.flatten(2)) + input_1CD
    gated = layer.mlp.gated(layer.mlp_norm(middle_1CD))
    with FROZEN_VALUES.needed(not for_gradients_only):
        return middle_1CD + layer.mlp.w2(gated)


class _TrainedGradients:
    """Sums gradients of trained parameters over pieces, to what one backward through all tokens gives."""

    def __init__(self, trained: Sequence[nn.Parameter]) -> None:
        self._trained = trained
        self.sums: list[Tensor | None] = [None] * len(trained)

    def add(self, ends: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Go back through one piece.

        Args:
            ends: outputs, each with its gradient.
            inputs: each with what its gradient is added to; for one that requires a gradient.
        """
        ends = [(output, grad) for output, grad in ends if output.requires_grad]
        inputs = [(input, total) for input, total in inputs if input.requires_grad]
        if not ends:
            return
        outputs, grad_outputs = zip(*ends, strict=True)
        sources = [*(input for input, _ in inputs), *self._trained]
        grads = torch.autograd.grad(outputs, sources, grad_outputs, allow_unused=True)
        for (_, total), grad in zip(inputs, grads, strict=False):
            total.add_(grad)
        for index, grad in enumerate(grads[len(inputs) :]):
            so_far = self.sums[index]
            if grad is not None:
                self.sums[index] = grad if so_far is None else so_far.add_(grad)


class _RandomState:
    """The state of the generators that dropout draws from, to draw the same again."""

    def __init__(self, device: torch.device) -> None:
        self._devices = [device] if device.type == "cuda" else []
        self._of_cpu = torch.get_rng_state()
        self._of_devices = [torch.cuda.get_rng_state(device) for device in self._devices]

    @contextmanager
    def set_back(self) -> Iterator[None]:
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._of_cpu)
            for device, state in zip(self._devices, self._of_devices, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
