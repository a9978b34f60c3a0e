"""Drawing the next token from logits: repetition penalty, temperature, top-k and top-p, in transformers' order.

Dimensions: `B` texts, `V` vocab_size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Settings for drawing the next token.

    Attributes:
        temperature: 0: the likeliest token; else logits are divided by it.
        top_k: draw from that many likeliest tokens only; None: from all.
        top_p: draw from the likeliest tokens that together have this probability only; None: from all. Nucleus
            sampling, Holtzman et al. 2020, arXiv 1904.09751, section 3.1.
        repetition_penalty: more than 1 makes tokens that are in the prompt or the answer less likely; 1: no penalty.
            Keskar et al. 2019, arXiv 1909.05858, section 4.1; negative logits are multiplied, as transformers does.
        seed: of the drawing.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0


def draw(logits_BV: Tensor, is_seen_BV: Tensor | None, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """Draw the next token of each text, (B,).

    Args:
        logits_BV: fp32.
        is_seen_BV: which tokens are in the text so far; needed only with a repetition penalty.
        generators: one for each text, so that its draws do not depend on the others.
    """
    logits_BV = filtered_logits(logits_BV, is_seen_BV, sampling)
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    probabilities_BV = torch.softmax(logits_BV, dim=-1)
    rows = zip(probabilities_BV, generators, strict=True)
    return torch.cat([torch.multinomial(row_V, 1, generator=generator) for row_V, generator in rows])


def filtered_logits(logits_BV: Tensor, is_seen_BV: Tensor | None, sampling: Sampling) -> Tensor:
    """Prepare logits for drawing: repetition is penalized, and excluded tokens get -inf."""
    if sampling.repetition_penalty != 1.0:
        assert is_seen_BV is not None
        penalized_BV = torch.where(
            logits_BV < 0, logits_BV * sampling.repetition_penalty, logits_BV / sampling.repetition_penalty
        )
        logits_BV = torch.where(is_seen_BV, penalized_BV, logits_BV)
    if sampling.temperature == 0:
        return logits_BV
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None:
        kth_B1 = logits_BV.topk(min(sampling.top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    if sampling.top_p is not None:
        ascending_BV, order_BV = logits_BV.sort(dim=-1)
        # A token is excluded if it and all less likely ones together have at most 1 - top_p.
        is_left_out_BV = ascending_BV.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        is_left_out_BV[:, -1] = False
        logits_BV = logits_BV.masked_fill(is_left_out_BV.scatter(1, order_BV, is_left_out_BV), -torch.inf)
    return logits_BV
