"""One optimizer step's gradients, and the loss of rows that are not trained on.

Dimensions: `T` tokens of all rows of a forward, `D` embed_dim.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.amp import GradScaler
from torchtune.modules import TransformerDecoder

from custom_components.datasets.batching import Batch
from custom_components.models.attention import RowLengths
from custom_components.models.hidden_states import final_hidden_states
from custom_components.runtime.errors import UserError
from custom_components.training.loss import LinearCrossEntropy

NOWHERE_ELSE: AbstractContextManager = nullcontext()


def accumulate_gradients(
    model: TransformerDecoder,
    batches: Sequence[Batch],
    loss_function: LinearCrossEntropy,
    scaler: GradScaler,
    *,
    num_recomputed_layers: int = 0,
    neftune_noise_alpha: float | None = None,
    activations_kept: AbstractContextManager = NOWHERE_ELSE,
    device: torch.device,
) -> Tensor:
    """Forward and backward over the batches of one optimizer step; returns the loss per supervised token, in nats.

    The sum over all batches is divided by the supervised tokens of all of them, so that N forwards of 1 row and 1 of N
    rows are the same step. It is divided before the backward, so that fp16 gradients do not overflow. `scaler`, enabled
    for fp16, leaves the gradients scaled.

    Args:
        num_recomputed_layers, neftune_noise_alpha: see :func:`final_hidden_states`.
        activations_kept: entered during the forward, as torchtune's `OffloadActivations`.
    """
    num_supervised_tokens = sum(batch.num_supervised_tokens for batch in batches)
    total = torch.zeros((), device=device)
    # note: before the first forward, because copying from the host waits for what the device is doing.
    for batch in [batch.to(device) for batch in batches]:
        with activations_kept:
            hidden_1TD = final_hidden_states(
                model,
                batch.tokens_1T,
                RowLengths(batch.row_lengths, batch.boundaries),
                batch.positions_1T,
                num_recomputed_layers=num_recomputed_layers,
                neftune_noise_alpha=neftune_noise_alpha,
            )
        loss = supervised_loss(model, hidden_1TD, batch, loss_function) / num_supervised_tokens
        scaler.scale(loss).backward()
        total += loss.detach()
    return total


def supervised_loss(
    model: TransformerDecoder, hidden_1TD: Tensor, batch: Batch, loss_function: LinearCrossEntropy
) -> Tensor:
    """The summed loss of a batch's supervised positions, in nats."""
    hidden_PD = hidden_1TD[0].index_select(0, batch.supervised_P)
    return loss_function(hidden_PD, model.output, batch.labels_1T[0].index_select(0, batch.supervised_P))


@torch.no_grad()
def validation_loss(
    model: TransformerDecoder, batches: Sequence[Batch], loss_function: LinearCrossEntropy, device: torch.device
) -> float:
    """The loss per supervised token over all batches, in nats, without dropout.

    Raises:
        UserError: it is NaN or infinite.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in batches:
        batch = batch.to(device)
        hidden_1TD = final_hidden_states(
            model, batch.tokens_1T, RowLengths(batch.row_lengths, batch.boundaries), batch.positions_1T
        )
        total += supervised_loss(model, hidden_1TD, batch, loss_function)
    model.train(was_training)
    mean = total.item() / sum(batch.num_supervised_tokens for batch in batches)
    if not math.isfinite(mean):
        raise UserError(f"the validation loss is {mean}; lower optimizer.lr")
    return mean
