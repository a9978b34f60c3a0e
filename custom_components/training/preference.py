"""The loss of learning preferences: pairs of answers, compared by their log-probabilities.

Dimensions: `N` pairs, 2 answers of each, first the chosen one; `A` answers, 2N; `P` supervised positions; `M` measures.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from custom_components.datasets.batching import Batch
from custom_components.datasets.pair_batching import PairBatch
from custom_components.training.gradients import ForwardOptions, Losses, LossOf, supervised_hidden_states
from custom_components.training.loss import LinearCrossEntropy
from custom_components.training.preference_losses import AnswerLogProbabilities, PairLosses, margins

# Of the argument `answers`, the log-probabilities of pairs.
PreferenceLoss = Callable[..., PairLosses]

# The measures of a pair beside its loss, by their names in metrics.jsonl; means over pairs, in nats but for accuracy.
MEASURES = ("reward_margin", "reward_accuracy", "chosen_log_probability", "rejected_log_probability")


@dataclass(frozen=True)
class MeasuredLosses(Losses):
    """The losses of a preference recipe, with the measures of the pairs that each has seen since they were taken."""

    training_measures: "PairMeasures"
    validation_measures: "PairMeasures"


class PairMeasures:
    """Sums the measures of pairs where they are computed, so that a step waits for its device once."""

    def __init__(self) -> None:
        self._sums_M: Tensor | None = None
        self._num_pairs = 0

    def add(self, policy_N2: Tensor, rewards_N2: Tensor) -> None:
        margins_N = margins(rewards_N2)
        measures_MN = torch.stack([margins_N, (margins_N > 0).to(margins_N.dtype), *policy_N2.T]).detach()
        sums_M = measures_MN.sum(1)
        self._sums_M = sums_M if self._sums_M is None else self._sums_M + sums_M
        self._num_pairs += len(margins_N)

    def take(self) -> dict[str, float]:
        """Give the means by the names of `MEASURES`, and begin again."""
        assert self._sums_M is not None
        means = (self._sums_M / self._num_pairs).tolist()
        self._sums_M, self._num_pairs = None, 0
        return dict(zip(MEASURES, means, strict=True))


def answer_log_probabilities(
    model: TransformerDecoder, batch: PairBatch, log_losses: LinearCrossEntropy, options: ForwardOptions
) -> Tensor:
    """Compute the log-probabilities of the answers, (N, 2), in one forward of both dialogs of every pair."""
    hidden_PD = supervised_hidden_states(model, batch, options)
    labels_P = batch.labels_1T[0].index_select(0, batch.supervised_P)
    losses_P = log_losses.position_losses(hidden_PD, model.output, labels_P)
    # In fp64: what is compared is the small difference of two such sums over hundreds of tokens.
    sums_A = losses_P.new_zeros(2 * batch.num_units, dtype=torch.float64)
    return -sums_A.index_add(0, batch.answers_P, losses_P.double()).view(-1, 2)


def preference_loss(
    model: TransformerDecoder,
    loss_function: PreferenceLoss,
    log_losses: LinearCrossEntropy,
    measures: PairMeasures,
    options: ForwardOptions | None = None,
) -> LossOf:
    """Make the loss of preference learning: the sum over a batch's pairs.

    Args:
        loss_function: one of :mod:`preference_losses`.
        log_losses: projects the answers' positions, a chunk at a time.
        measures: gets those of every pair.
    """
    options = options or ForwardOptions()

    def loss_of(batch: Batch) -> Tensor:
        assert isinstance(batch, PairBatch)
        policy_N2 = answer_log_probabilities(model, batch, log_losses, options)
        answers = AnswerLogProbabilities(policy_N2, batch.reference_N2, batch.num_tokens_N2)
        losses_N, rewards_N2 = loss_function(answers=answers)
        measures.add(policy_N2, rewards_N2)
        return losses_N.sum().float()

    return loss_of


@torch.no_grad()
def reference_log_probabilities(
    model: TransformerDecoder, batches: Iterable[PairBatch], log_losses: LinearCrossEntropy, device: torch.device
) -> list[list[float]]:
    """Compute the log-probabilities of all answers under the model as it is now, without dropout: one row a pair.

    The model as a run begins is the reference: a new adapter changes nothing, so it is the base; after supervised
    fine-tuning it is the adapter that the run begins from.
    """
    was_training = model.training
    model.eval()
    rated = [
        pair
        for batch in batches
        for pair in answer_log_probabilities(model, batch.to(device), log_losses, ForwardOptions()).tolist()
    ]
    model.train(was_training)
    return rated
