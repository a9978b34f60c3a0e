"""How well a model predicts the rows of a data set.

Dimensions: `T` tokens of all rows of a forward, `P` supervised positions, `C` positions of a chunk, `D` embed_dim,
`V` vocab_size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.modules import TiedLinear, TransformerDecoder
from tqdm import tqdm

from custom_components.datasets.batching import Batch, BatchPlan, collate
from custom_components.datasets.tokenized_rows import ChatDataset
from custom_components.models.attention import RowLengths
from custom_components.models.hidden_states import final_hidden_states
from custom_components.models.output_head import log_probability_chunks, of_labels
from custom_components.runtime.errors import UserError


@dataclass(frozen=True)
class TokenScores:
    """Sums over supervised tokens: their losses in nats, in float64, and how many were the likeliest token."""

    num_tokens: int = 0
    loss_sum: float = 0.0
    num_likeliest: int = 0

    def __add__(self, other: "TokenScores") -> "TokenScores":
        return TokenScores(
            self.num_tokens + other.num_tokens,
            self.loss_sum + other.loss_sum,
            self.num_likeliest + other.num_likeliest,
        )

    @property
    def loss(self) -> float:
        """The mean over tokens, in nats."""
        return self.loss_sum / self.num_tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def token_accuracy(self) -> float:
        return self.num_likeliest / self.num_tokens

    @property
    def measures(self) -> dict[str, float | int]:
        return {
            "supervised_tokens": self.num_tokens,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "token_accuracy": self.token_accuracy,
        }


@torch.no_grad()
def position_scores(model: TransformerDecoder, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Score each supervised position of a batch: its label's log-probability, and whether no token is likelier.

    Returns:
        (P,) float64 in nats, and (P,) bool, on the CPU, in the order of the positions.
    """
    batch = batch.to(device)
    hidden_1TD = final_hidden_states(
        model, batch.tokens_1T, RowLengths(batch.row_lengths, batch.boundaries), batch.positions_1T
    )
    return head_scores(hidden_1TD, model.output, batch.labels_1T)


def head_scores(
    hidden_1TD: Tensor, output_head: nn.Module | TiedLinear, labels_1T: Tensor, *, chunk_size: int = 512
) -> tuple[Tensor, Tensor]:
    """Score positions as :func:`position_scores` does; the logits of `chunk_size` of them exist at a time."""
    is_supervised_T = labels_1T.flatten() != CROSS_ENTROPY_IGNORE_IDX
    hidden_PD = hidden_1TD.flatten(0, 1)[is_supervised_T]
    labels_P = labels_1T.flatten()[is_supervised_T]
    log_probabilities_P = torch.empty(len(labels_P), dtype=torch.float64)
    is_likeliest_P = torch.empty(len(labels_P), dtype=torch.bool)
    for chunk, log_probabilities_CV in log_probability_chunks(hidden_PD, output_head, chunk_size):
        log_probabilities_P[chunk] = of_labels(log_probabilities_CV, labels_P[chunk])
        is_likeliest_P[chunk] = log_probabilities_CV.argmax(dim=1) == labels_P[chunk]
    return log_probabilities_P, is_likeliest_P


def scores_by_source(
    model: TransformerDecoder, dataset: ChatDataset, batch_size: int, device: torch.device
) -> dict[str, TokenScores]:
    """Score all supervised tokens of each source, and if there are several, of all together as "all rows".

    Args:
        batch_size: rows of one forward.

    Raises:
        UserError: a loss is NaN or infinite.
    """
    scores = {source: token_scores(model, rows, batch_size, device) for source, rows in rows_by_source(dataset).items()}
    return scores if len(scores) == 1 else {**scores, "all rows": sum(scores.values(), TokenScores())}


def token_scores(model: TransformerDecoder, dataset: ChatDataset, batch_size: int, device: torch.device) -> TokenScores:
    """Score all supervised tokens of a data set, see :func:`scores_by_source`."""
    assert not model.training
    plan = BatchPlan(batch_size, 1, shuffle=False, seed=0)
    total = TokenScores()
    for [rows] in tqdm(
        plan.steps(dataset.lengths, epoch=0), "scoring", unit="forward", leave=False, delay=2, disable=None
    ):
        log_probabilities_P, is_likeliest_P = position_scores(model, collate([dataset[row] for row in rows]), device)
        total += TokenScores(len(log_probabilities_P), -log_probabilities_P.sum().item(), int(is_likeliest_P.sum()))
        if not math.isfinite(total.loss_sum):
            raise UserError(
                f"the loss of the rows {rows}, counted from 0, is {total.loss_sum}: the checkpoint or the adapter is "
                "damaged, or the dtype too narrow; try dtype=fp32"
            )
    return total


def rows_by_source(dataset: ChatDataset) -> dict[str, ChatDataset]:
    """Split a data set by source, in the order of the sources; those without a row are left out."""
    indices: dict[str, list[int]] = {summary.name: [] for summary in dataset.summaries}
    for index, source in enumerate(dataset.sources):
        indices[source].append(index)
    return {source: dataset.rows(rows) for source, rows in indices.items() if rows}
