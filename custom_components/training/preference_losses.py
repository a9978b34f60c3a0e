"""Losses of pairs of answers, which a config names as `loss`: each a function of the answers' log-probabilities.

Dimensions: `N` pairs; 2 answers of each, first the chosen one.

The reward of an answer is the quantity that a loss compares: for DPO's kin beta * log(policy / reference).
"""

from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_FlipRate = Annotated[float, Field(ge=0, lt=0.5)]

# The losses that compare answers without a reference model.
REFERENCE_FREE = ("simpo", "orpo")


class AnswerLogProbabilities(NamedTuple):
    """Log-probabilities of whole answers, in nats.

    Attributes:
        policy_N2: under the model that is trained.
        reference_N2: under the reference model, without gradient. Zero where the loss needs none.
        num_tokens_N2: the tokens of each answer, its EOS included.
    """

    policy_N2: Tensor
    reference_N2: Tensor
    num_tokens_N2: Tensor

    @property
    def log_ratios_N2(self) -> Tensor:
        return self.policy_N2 - self.reference_N2


class PairLosses(NamedTuple):
    """The loss of each pair, and the rewards of its answers."""

    losses_N: Tensor
    rewards_N2: Tensor


def sigmoid(answers: AnswerLogProbabilities, beta: _Positive = 0.1) -> PairLosses:
    """Compute DPO's loss: Rafailov et al. 2023, arXiv 2305.18290, equation 7.

    Args:
        beta: the weight of staying near the reference; less: further from it.
    """
    rewards_N2 = beta * answers.log_ratios_N2
    return PairLosses(-F.logsigmoid(margins(rewards_N2)), rewards_N2)


def rpo(answers: AnswerLogProbabilities, beta: _Positive = 0.1, alpha: _NotNegative = 1.0) -> PairLosses:
    """Compute DPO's loss and the chosen answer's loss per token, which keeps the answer likely: iterative RPO's.

    Pang et al. 2024, arXiv 2404.19733, equation 1. As in TRL, the average is over the tokens of the answer; the paper's
    counts those of the question too.

    Args:
        beta: see :func:`sigmoid`.
        alpha: the weight of the chosen answer's loss, as in supervised fine-tuning.
    """
    losses_N, rewards_N2 = sigmoid(answers, beta)
    averages_N = answers.policy_N2[:, 0] / answers.num_tokens_N2[:, 0]
    return PairLosses(losses_N - alpha * averages_N, rewards_N2)


def cdpo(answers: AnswerLogProbabilities, beta: _Positive = 0.1, label_smoothing: _FlipRate = 0.1) -> PairLosses:
    """Compute conservative DPO's loss, for pairs of which a share is the wrong way round.

    Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO".

    Args:
        beta: see :func:`sigmoid`.
        label_smoothing: that share.
    """
    rewards_N2 = beta * answers.log_ratios_N2
    right_N, flipped_N = -F.logsigmoid(margins(rewards_N2)), -F.logsigmoid(-margins(rewards_N2))
    return PairLosses((1 - label_smoothing) * right_N + label_smoothing * flipped_N, rewards_N2)


def robust(answers: AnswerLogProbabilities, beta: _Positive = 0.1, label_smoothing: _FlipRate = 0.1) -> PairLosses:
    """Compute robust DPO's loss, unbiased where a share of the pairs is the wrong way round.

    Chowdhury, Kini and Natarajan 2024, "Provably robust DPO", arXiv 2403.00409.

    Args:
        beta: see :func:`sigmoid`.
        label_smoothing: that share.
    """
    rewards_N2 = beta * answers.log_ratios_N2
    right_N, flipped_N = -F.logsigmoid(margins(rewards_N2)), -F.logsigmoid(-margins(rewards_N2))
    unbiased_N = ((1 - label_smoothing) * right_N - label_smoothing * flipped_N) / (1 - 2 * label_smoothing)
    return PairLosses(unbiased_N, rewards_N2)


def ipo(answers: AnswerLogProbabilities, beta: _Positive = 0.1) -> PairLosses:
    """Compute IPO's loss: Azar et al. 2023, arXiv 2310.12036, equation 17.

    As in TRL 1.16, an answer's log-ratio is its average over the answer's tokens. The paper does not say so; with sums
    the loss would grow with the square of the length.

    Args:
        beta: the paper's tau. The margin of the averages that is aimed at is 1 / (2 beta).
    """
    averages_N2 = answers.log_ratios_N2 / answers.num_tokens_N2
    return PairLosses((margins(averages_N2) - 1 / (2 * beta)) ** 2, beta * averages_N2)


def simpo(answers: AnswerLogProbabilities, beta: _Positive = 2.0, gamma: _NotNegative = 1.0) -> PairLosses:
    """Compute SimPO's loss, which needs no reference: Meng et al. 2024, arXiv 2405.14734, equation 6.

    Args:
        beta: the scale of the rewards, an answer's average log-probability per token.
        gamma: the margin of rewards that is aimed at.
    """
    rewards_N2 = beta * answers.policy_N2 / answers.num_tokens_N2
    return PairLosses(-F.logsigmoid(margins(rewards_N2) - gamma), rewards_N2)


def orpo(answers: AnswerLogProbabilities, beta: _Positive = 0.1) -> PairLosses:
    """Compute ORPO's loss, which needs no reference: Hong et al. 2024, arXiv 2403.07691, equations 6 and 7.

    It is the chosen answer's loss per token, as in supervised fine-tuning, and a penalty on the ratio of odds.

    Args:
        beta: the paper's lambda, the weight of the penalty.
    """
    averages_N2 = answers.policy_N2 / answers.num_tokens_N2
    # note: an answer of probability 1 would have infinite odds.
    log_odds_N2 = averages_N2 - torch.log(-torch.expm1(averages_N2.clamp(max=-1e-7)))
    penalties_N = -F.logsigmoid(margins(log_odds_N2))
    return PairLosses(-averages_N2[:, 0] + beta * penalties_N, beta * averages_N2)


def margins(values_N2: Tensor) -> Tensor:
    """Subtract each rejected answer's value from the chosen one's: (N,)."""
    return values_N2[:, 0] - values_N2[:, 1]


def needs_reference(loss_path: str) -> bool:
    """Tell whether a loss, by its dotted path, compares answers with those of a reference model."""
    module, _, name = loss_path.rpartition(".")
    return module != __name__ or name not in REFERENCE_FREE
