"""One optimizer step's gradients, and the loss of rows that are not trained on.

Dimensions: `T` tokens of all rows of a forward, `D` embed_dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.amp import GradScaler
from torchtune.modules import TransformerDecoder

from custom_components.batching import Batch
from custom_components.builders import final_hidden_states
from custom_components.errors import UserError
from custom_components.loss import LinearCrossEntropy


def accumulate_gradients(
    model: TransformerDecoder,
    batches: Sequence[Batch],
    loss_function: LinearCrossEntropy,
    scaler: GradScaler,
    *,
    recompute_layers: bool = False,
    neftune_noise_alpha: float | None = None,
    device: torch.device,
) -> Tensor:
    """Forward and backward over the batches of one optimizer step; returns the loss per supervised token, in nats.

    The sum over all batches is divided by the supervised tokens of all of them, so that N forwards of 1 row and 1 of N
    rows are the same step. It is divided before the backward, so that fp16 gradients do not overflow. `scaler`, enabled
    for fp16, leaves the gradients scaled.
    """
    num_supervised_tokens = sum(batch.num_supervised_tokens for batch in batches)
    total = torch.zeros((), device=device)
    for batch in batches:
        batch = batch.to(device)
        hidden_1TD = final_hidden_states(
            model,
            batch.tokens_1T,
            batch.rows,
            batch.positions_1T,
            recompute_layers=recompute_layers,
            neftune_noise_alpha=neftune_noise_alpha,
        )
        loss = loss_function(hidden_1TD, model.output, batch.labels_1T) / num_supervised_tokens
        scaler.scale(loss).backward()
        total += loss.detach()
    return total


@torch.no_grad()
def validation_loss(
    model: TransformerDecoder, batches: Sequence[Batch], loss_function: LinearCrossEntropy, device: torch.device
) -> float:
    """The loss per supervised token over all batches, in nats, without dropout."""
    was_training = model.training
    model.eval()
    total = 0.0
    for batch in batches:
        batch = batch.to(device)
        hidden_1TD = final_hidden_states(model, batch.tokens_1T, batch.rows, batch.positions_1T)
        total += loss_function(hidden_1TD, model.output, batch.labels_1T).item()
    model.train(was_training)
    return total / sum(batch.num_supervised_tokens for batch in batches)


def stop_if_not_finite(loss: Tensor, grad_norm: Tensor, step: int, forwards: list[list[int]]) -> None:
    """Refuse to go on from a step whose loss or gradient is NaN or infinite.

    Raises:
        UserError: with the step and its rows.
    """
    if not (loss.isfinite() and grad_norm.isfinite()):
        raise UserError(
            f"step {step}: loss {loss.item()}, gradient norm {grad_norm.item()}; the rows of the step are {forwards}, "
            "counted from 0. Look at them with recipes/preview.py, or lower optimizer.lr"
        )
