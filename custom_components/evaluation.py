"""How well a model predicts the rows of a data set, and how near its own answers come to those of the rows.

Dimensions: `T` tokens of all rows of a forward, `P` supervised positions, `C` positions of a chunk, `D` embed_dim,
`V` vocab_size.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.modules import TiedLinear, TransformerDecoder
from tqdm import tqdm

from custom_components.batching import Batch, BatchPlan, collate
from custom_components.builders import final_hidden_states
from custom_components.errors import UserError
from custom_components.generation import generate
from custom_components.sampling import Sampling
from custom_components.tokenized_rows import ChatDataset
from custom_components.transforms import Llama2ChatTransform

_CHUNK_POSITIONS = 512  # positions whose logits exist at a time


@dataclass(frozen=True)
class TokenScores:
    """Sums over supervised tokens, in float64: of their losses in nats, and of how many were the likeliest token."""

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
    """For each supervised position of a batch, in order: its label's log-probability, and whether no token is likelier.

    Returns:
        (P,) float64 in nats, and (P,) bool, on the CPU.
    """
    batch = batch.to(device)
    hidden_1TD = final_hidden_states(model, batch.tokens_1T, batch.rows, batch.positions_1T)
    return head_scores(hidden_1TD, model.output, batch.labels_1T)


def head_scores(hidden_1TD: Tensor, output_head: nn.Module | TiedLinear, labels_1T: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`position_scores`; the logits of a chunk of supervised positions exist at a time, in fp32."""
    is_supervised_T = labels_1T.flatten() != CROSS_ENTROPY_IGNORE_IDX
    hidden_PD = hidden_1TD.flatten(0, 1)[is_supervised_T]
    labels_P = labels_1T.flatten()[is_supervised_T]
    log_probabilities, is_likeliest = [], []
    for hidden_CD, labels_C in zip(hidden_PD.split(_CHUNK_POSITIONS), labels_P.split(_CHUNK_POSITIONS), strict=True):
        logits_CV = output_head(hidden_CD).float()
        label_logits_C = logits_CV.gather(1, labels_C.unsqueeze(1)).squeeze(1)
        log_probabilities.append((label_logits_C - logits_CV.logsumexp(dim=1)).double().cpu())
        is_likeliest.append((logits_CV.argmax(dim=1) == labels_C).cpu())
    return torch.cat(log_probabilities), torch.cat(is_likeliest)


def scores_by_source(
    model: TransformerDecoder, dataset: ChatDataset, batch_size: int, device: torch.device
) -> dict[str, TokenScores]:
    """The scores of all supervised tokens of each source, and of all of them together as "all rows" where several.

    Args:
        batch_size: rows of one forward.

    Raises:
        UserError: a loss is NaN or infinite.
    """
    scores = {source: token_scores(model, rows, batch_size, device) for source, rows in rows_by_source(dataset).items()}
    return scores if len(scores) == 1 else {**scores, "all rows": sum(scores.values(), TokenScores())}


def token_scores(model: TransformerDecoder, dataset: ChatDataset, batch_size: int, device: torch.device) -> TokenScores:
    """See :func:`scores_by_source`."""
    assert not model.training
    plan = BatchPlan(batch_size, 1, shuffle=False, seed=0)
    total = TokenScores()
    for [rows] in tqdm(plan.steps(dataset.lengths, epoch=0), "scoring", unit="forward", leave=False, delay=2):
        log_probabilities_P, is_likeliest_P = position_scores(model, collate([dataset[row] for row in rows]), device)
        total += TokenScores(len(log_probabilities_P), -log_probabilities_P.sum().item(), int(is_likeliest_P.sum()))
        if not math.isfinite(total.loss_sum):
            raise UserError(
                f"the loss of the rows {rows}, counted from 0, is {total.loss_sum}: the checkpoint or the adapter is "
                "damaged, or the dtype too narrow; try dtype=fp32"
            )
    return total


def rows_by_source(dataset: ChatDataset) -> dict[str, ChatDataset]:
    """The rows of each source of a data set, in the order of the sources; those without a row are left out."""
    indices: dict[str, list[int]] = {summary.source: [] for summary in dataset.summaries}
    for index, source in enumerate(dataset.sources):
        indices[source].append(index)
    return {source: dataset.rows(rows) for source, rows in indices.items() if rows}


@dataclass(frozen=True)
class Question:
    """A row's last question, with all that stands before it, and the answer the row gives.

    Attributes:
        prompt: ids, up to where the answer begins.
        reference: the answer as text.
    """

    prompt: list[int]
    reference: str


def held_out_questions(dataset: ChatDataset, tokenizer: Llama2ChatTransform, num_rows: int) -> list[Question]:
    """The last question and answer of the first `num_rows` rows that have one.

    Rows of plain text have no question, and an answer that was cut to `max_seq_len` is none to compare with.

    Raises:
        UserError: no row has a question with a whole answer.
    """
    questions: list[Question] = []
    for index in range(len(dataset)):
        if len(questions) == num_rows:
            break
        row = dataset[index]
        is_answer = np.array(row["labels"]) != CROSS_ENTROPY_IGNORE_IDX
        end = int(np.flatnonzero(is_answer)[-1]) + 1
        start = end - int(np.argmin([*is_answer[end - 1 :: -1], False]))
        is_whole = row["tokens"][end - 1] == tokenizer.eos_id
        if is_whole and row["tokens"][:start] not in ([], [tokenizer.bos_id]):
            questions.append(Question(row["tokens"][:start], tokenizer.decode(row["tokens"][start:end]).strip()))
    if not questions:
        raise UserError("generate_answers: no row of the data set has a question with a whole answer; set it to 0")
    return questions


def generated_answers(
    model: TransformerDecoder,
    tokenizer: Llama2ChatTransform,
    questions: Sequence[Question],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """The model's greedy answers, stripped as the references are."""
    order = sorted(range(len(questions)), key=lambda index: -len(questions[index].prompt))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    answers = [""] * len(questions)
    for batch in tqdm(batches, "answering", unit="batch", leave=False, delay=2):
        ids = generate(
            model,
            [questions[index].prompt for index in batch],
            max_new_tokens=max_new_tokens,
            stop_tokens=tokenizer.stop_tokens,
            sampling=Sampling(),
        )
        for index, answer_ids in zip(batch, ids, strict=True):
            answers[index] = tokenizer.decode(answer_ids).strip()
    return answers


def answer_measures(answers: Sequence[str], questions: Sequence[Question]) -> dict[str, float | int]:
    """How near answers come to those of the rows."""
    references = [question.reference for question in questions]
    return {
        "questions": len(questions),
        "exact_match": exact_match(answers, references),
        "rouge_l": rouge_l(answers, references),
    }


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """The share of answers that are the reference, character for character."""
    return sum(answer == reference for answer, reference in zip(answers, references, strict=True)) / len(references)


class _Words:
    """rouge-score's tokenizer protocol: lower-case words of any script.

    For ASCII the words are those of its own tokenizer, which drops every other letter: an answer in Greek would have
    none.
    """

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
    """The mean F-measure of ROUGE-L over the answers, 0 to 1: Lin 2004, section 3, by Google's `rouge-score`."""
    scorer = rouge_scorer().RougeScorer(["rougeL"], tokenizer=_Words())
    f_measures = [
        scorer.score(reference, answer)["rougeL"].fmeasure
        for answer, reference in zip(answers, references, strict=True)
    ]
    return sum(f_measures) / len(f_measures)


def rouge_scorer() -> Any:
    """The module of the `rouge-score` package.

    Raises:
        UserError: it is not installed.
    """
    try:
        from rouge_score import rouge_scorer as module
    except ImportError:
        raise UserError("generate_answers: needs the package rouge-score; pip install -e '.[eval]'") from None
    return module
