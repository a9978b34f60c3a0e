"""Which rank computes which forwards of an optimizer step."""

from collections.abc import Sequence


def dealt(num_tokens: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Deal a step's forwards to ranks, so that all are done at about the same time.

    The largest first, each to the rank with the fewest tokens so far, as Graham 1969 schedules jobs ("Bounds on
    multiprocessing timing anomalies", longest processing time first). No rank gets more forwards than a full round
    gives, so in a step of W x N forwards each of W ranks has N.

    Args:
        num_tokens: of each forward.

    Returns:
        for each rank the numbers of its forwards, ascending; empty where there are fewer forwards than ranks.
    """
    num_at_most = -(-len(num_tokens) // num_ranks)
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for number in sorted(range(len(num_tokens)), key=lambda number: -num_tokens[number]):
        rank = min((rank for rank in range(num_ranks) if len(shares[rank]) < num_at_most), key=loads.__getitem__)
        shares[rank].append(number)
        loads[rank] += num_tokens[number]
    return [sorted(share) for share in shares]
