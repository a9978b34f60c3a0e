"""Causal attention in 16 bits on the CPU as plain products, a block of queries at a time, with fp32 scores.

torch's kernel for the CPU takes up to three times as long in 16 bits (benchmarks/README.md).

Dimensions: `S` tokens of all rows, `N` query heads, `K` key/value heads, `G` query heads that share one of them,
`H` head_dim, `E` tokens of a row up to the end of a block, `B` tokens of the block, `Q` its queries, G x B.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Fewer: less wasted work, as a block attends to no key after its end. More: fewer, larger operations.
NUM_BLOCK_TOKENS = 128
# A longer row would keep too many probabilities, one for each pair of tokens; its backward computes them again.
MAX_KEPT_TOKENS = 256


class _Block(NamedTuple):
    """The positions of a block's queries and of the keys they attend to, among the tokens of all rows."""

    queries: slice
    keys: slice
    keeps_probabilities: bool


def attend_blockwise(
    query_1NSH: Tensor,
    key_1KSH: Tensor,
    value_1KSH: Tensor,
    lengths: Sequence[int],
    *,
    num_block_tokens: int = NUM_BLOCK_TOKENS,
    max_kept_tokens: int = MAX_KEPT_TOKENS,
) -> Tensor:
    """Attend causally inside each row of a sequence of rows of these lengths: (1, N, S, H)."""
    query_KGSH = query_1NSH[0].unflatten(0, (key_1KSH.shape[1], -1))
    blocks = tuple(_blocks(lengths, num_block_tokens, max_kept_tokens))
    output_KGSH = _BlockwiseAttention.apply(query_KGSH, key_1KSH[0], value_1KSH[0], blocks)
    return output_KGSH.flatten(0, 1).unsqueeze(0)


def _blocks(lengths: Sequence[int], num_block_tokens: int, max_kept_tokens: int) -> Iterator[_Block]:
    for row_start, row_stop in pairwise(accumulate(lengths, initial=0)):
        for start in range(row_start, row_stop, num_block_tokens):
            stop = min(start + num_block_tokens, row_stop)
            yield _Block(slice(start, stop), slice(row_start, stop), row_stop - row_start <= max_kept_tokens)


class _BlockwiseAttention(torch.autograd.Function):
    """O = P V with P = softmax(s Q K^T).

    Of the gradient O', P' = O' V^T and the scores' S' = P (P' - rowsum(P P')): V' = P^T O', Q' = s S' K, K' = s S'^T Q.
    """

    @staticmethod
    def forward(ctx: Any, query_KGSH: Tensor, key_KSH: Tensor, value_KSH: Tensor, blocks: Sequence[_Block]) -> Tensor:
        output_KGSH = _empty_like(query_KGSH)
        kept = []
        for block in blocks:
            query_KQH = query_KGSH[:, :, block.queries].flatten(1, 2)
            probabilities_KQE = _probabilities(query_KQH, key_KSH[:, block.keys], len(query_KGSH[0]))
            output_KQH = torch.bmm(probabilities_KQE, value_KSH[:, block.keys])
            output_KGSH[:, :, block.queries] = output_KQH.unflatten(1, (len(query_KGSH[0]), -1))
            kept.append(probabilities_KQE if block.keeps_probabilities else None)
        ctx.blocks = blocks
        ctx.save_for_backward(query_KGSH, key_KSH, value_KSH, *kept)
        return output_KGSH

    @staticmethod
    def backward(ctx: Any, grad_output_KGSH: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query_KGSH, key_KSH, value_KSH, *kept = ctx.saved_tensors
        num_sharing, scale = query_KGSH.shape[1], _scale(query_KGSH)
        grad_query_KGSH = _empty_like(query_KGSH)
        # Blocks of one row add to the same keys and values.
        grad_key_KSH, grad_value_KSH = (torch.zeros_like(key_KSH, dtype=torch.float32) for _ in range(2))
        for block, probabilities_KQE in zip(ctx.blocks, kept, strict=True):
            query_KQH = query_KGSH[:, :, block.queries].flatten(1, 2)
            key_KEH, value_KEH = key_KSH[:, block.keys], value_KSH[:, block.keys]
            grad_output_KQH = grad_output_KGSH[:, :, block.queries].flatten(1, 2)
            if probabilities_KQE is None:
                probabilities_KQE = _probabilities(query_KQH, key_KEH, num_sharing)
            grad_value_KSH[:, block.keys] += torch.bmm(probabilities_KQE.transpose(1, 2), grad_output_KQH)
            grad_probabilities_KQE = torch.bmm(grad_output_KQH, value_KEH.transpose(1, 2))
            grad_scores_KQE = torch.ops.aten._softmax_backward_data(
                grad_probabilities_KQE, probabilities_KQE, -1, probabilities_KQE.dtype
            )
            grad_query_KQH = torch.bmm(grad_scores_KQE, key_KEH).mul_(scale)
            grad_query_KGSH[:, :, block.queries] = grad_query_KQH.unflatten(1, (num_sharing, -1))
            grad_key_KSH[:, block.keys] += torch.bmm(grad_scores_KQE.transpose(1, 2), query_KQH)
        grad_key_KSH.mul_(scale)
        return grad_query_KGSH, grad_key_KSH.to(key_KSH.dtype), grad_value_KSH.to(value_KSH.dtype), None


def _probabilities(query_KQH: Tensor, key_KEH: Tensor, num_sharing: int) -> Tensor:
    """Compute how much each query, one of the last tokens up to E, attends to each key, in 16 bits."""
    scores_KQE = torch.bmm(query_KQH.float().mul_(_scale(query_KQH)), key_KEH.float().transpose(1, 2))
    scores_KGBE = scores_KQE.unflatten(1, (num_sharing, -1))
    num_block_tokens = scores_KGBE.shape[2]
    future_BB = scores_KQE.new_full((num_block_tokens, num_block_tokens), -math.inf).triu_(1)
    scores_KGBE[..., -num_block_tokens:] += future_BB
    return scores_KQE.softmax(dim=-1).to(query_KQH.dtype)


def _scale(query: Tensor) -> float:
    return query.shape[-1] ** -0.5


def _empty_like(heads_KGSH: Tensor) -> Tensor:
    """Allocate a tensor laid out token after token, as the products before and after the attention need it."""
    num_kv_heads, num_sharing, num_tokens, head_dim = heads_KGSH.shape
    return heads_KGSH.new_empty(num_tokens, num_kv_heads, num_sharing, head_dim).permute(1, 2, 0, 3)
