"""The forward of a model up to its output head."""

import math

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from custom_components.models.attention import RowLengths
from custom_components.models.layer_in_pieces import KEPT_IN_PLACE, LayerInputs


def final_hidden_states(
    model: TransformerDecoder,
    tokens: Tensor,
    mask: Tensor | RowLengths | None,
    positions: Tensor,
    *,
    num_recomputed_layers: int = 0,
    layer_inputs: LayerInputs = KEPT_IN_PLACE,
    neftune_noise_alpha: float | None = None,
) -> Tensor:
    """Compute what `model` gives its output head: normalized hidden states, (B, S, embed_dim), for (B, S) tokens.

    `model(...)` itself projects every position on the vocabulary and refuses more tokens than the context, which rows
    laid end to end have.

    Args:
        mask, positions: see :class:`SelfAttention`.
        num_recomputed_layers: the first so many layers that have a backward keep only their input for it; it computes
            the rest again. The rows are then end to end.
        layer_inputs: where they keep it.
        neftune_noise_alpha: noise on the embeddings while the model trains, see :func:`neftune_noise`.
    """
    hidden = model.tok_embeddings(tokens)
    if neftune_noise_alpha is not None and model.training:
        hidden = hidden + neftune_noise(hidden, mask, neftune_noise_alpha)
    first = first_layer_with_backward(model)
    for index, layer in enumerate(model.layers):
        if first <= index < first + num_recomputed_layers:
            hidden = layer(hidden, mask=mask, input_pos=positions, kept_in=layer_inputs)
        else:
            hidden = layer(hidden, mask=mask, input_pos=positions)
    return model.norm(hidden)


def first_layer_with_backward(model: TransformerDecoder) -> int:
    """Find the first layer through which gradients flow: those below it have nothing trained, nor has their input."""
    trains_embedding = any(parameter.requires_grad for parameter in model.tok_embeddings.parameters())
    for index, layer in enumerate(model.layers):
        if trains_embedding or any(parameter.requires_grad for parameter in layer.parameters()):
            return index
    return len(model.layers)


def num_layers_with_backward(model: TransformerDecoder) -> int:
    """Count the layers through which gradients flow."""
    return len(model.layers) - first_layer_with_backward(model)


def neftune_noise(embeddings: Tensor, mask: Tensor | RowLengths | None, alpha: float) -> Tensor:
    """Draw NEFTune's noise: uniform in [-1, 1] times alpha / sqrt(L * embed_dim), L the length of the token's row.

    Jain et al. 2023, arXiv 2310.05914, algorithm 1.

    Args:
        embeddings: (B, S, embed_dim).
        mask: the lengths of rows laid end to end; with any other mask every row has length S.
    """
    lengths = mask.lengths if isinstance(mask, RowLengths) else (embeddings.shape[1],)
    scales = [embeddings.new_full((length, 1), alpha / math.sqrt(length * embeddings.shape[2])) for length in lengths]
    return torch.empty_like(embeddings).uniform_(-1, 1) * torch.cat(scales)
