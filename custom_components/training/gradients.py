"""One optimizer step's gradients, and the loss of rows that are not trained on.

Dimensions: `T` tokens of all rows of a forward, `P` supervised positions, `D` embed_dim.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.amp import GradScaler
from torchtune.modules import TransformerDecoder

from custom_components.datasets.batching import Batch
from custom_components.models.attention import RowLengths
from custom_components.models.hidden_states import final_hidden_states
from custom_components.models.layer_in_pieces import KEPT_IN_PLACE, LayerInputs
from custom_components.runtime.errors import UserError
from custom_components.training.loss import LinearCrossEntropy

# Sums the loss of a batch to a scalar; training recipes differ in it. The mean is taken over `Batch.num_units`.
LossOf = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class ForwardOptions:
    """Options of a training step's forward.

    Attributes:
        num_recomputed_layers, neftune_noise_alpha, layer_inputs: see :func:`final_hidden_states`.
    """

    num_recomputed_layers: int = 0
    neftune_noise_alpha: float | None = None
    layer_inputs: LayerInputs = KEPT_IN_PLACE


@dataclass(frozen=True)
class Losses:
    """The loss that a recipe trains with, and the one that it validates with."""

    training: LossOf
    validation: LossOf


def supervised_loss(
    model: TransformerDecoder, loss_function: LinearCrossEntropy, options: ForwardOptions | None = None
) -> LossOf:
    """Make the loss of supervised fine-tuning: the sum over a batch's supervised positions, in nats."""
    options = options or ForwardOptions()

    def loss_of(batch: Batch) -> Tensor:
        hidden_PD = supervised_hidden_states(model, batch, options)
        return loss_function(hidden_PD, model.output, batch.labels_1T[0].index_select(0, batch.supervised_P))

    return loss_of


def supervised_hidden_states(model: TransformerDecoder, batch: Batch, options: ForwardOptions) -> Tensor:
    """Compute what a batch's supervised positions give the output head: (P, D)."""
    hidden_1TD = final_hidden_states(
        model,
        batch.tokens_1T,
        RowLengths(batch.row_lengths, batch.boundaries),
        batch.positions_1T,
        num_recomputed_layers=options.num_recomputed_layers,
        layer_inputs=options.layer_inputs,
        neftune_noise_alpha=options.neftune_noise_alpha,
    )
    return hidden_1TD[0].index_select(0, batch.supervised_P)


def accumulate_gradients(
    batches: Sequence[Batch],
    loss_of: LossOf,
    scaler: GradScaler,
    device: torch.device,
    seeds: Sequence[int] | None = None,
    num_units: int | None = None,
) -> Tensor:
    """Run forward and backward over the batches of one optimizer step; return the loss per unit.

    The sum over all batches is divided by the units of all of them, so N forwards of one row equal one forward of N
    rows. It is divided before the backward, so that fp16 gradients do not overflow. `scaler`, enabled for fp16, leaves
    the gradients scaled.

    Args:
        seeds: for what each forward draws, dropout and NEFTune's noise; None: torch's generators go on as they are.
        num_units: of all processes that take part in the step; None: of these batches, which are all.
    """
    if num_units is None:
        num_units = sum(batch.num_units for batch in batches)
    total = torch.zeros((), device=device)
    # note: before the first forward, because copying from the host waits for what the device is doing.
    for index, batch in enumerate([batch.to(device) for batch in batches]):
        if seeds is not None:
            torch.manual_seed(seeds[index])
        loss = loss_of(batch) / num_units
        scaler.scale(loss).backward()
        total += loss.detach()
    return total


@torch.no_grad()
def validation_loss(
    model: TransformerDecoder,
    batches: Sequence[Batch],
    loss_of: LossOf,
    device: torch.device,
    summed: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> float:
    """Compute the loss per unit over all batches, without dropout.

    Args:
        summed: sums a tensor over the processes that have a share of the batches each.

    Raises:
        UserError: it is NaN or infinite.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in batches:
        total += loss_of(batch.to(device))
    model.train(was_training)
    num_units = torch.tensor(sum(batch.num_units for batch in batches), dtype=torch.float64)
    mean = summed(total).item() / summed(num_units).item()
    if not math.isfinite(mean):
        raise UserError(f"the validation loss is {mean}; lower optimizer.lr")
    return mean
