"""Who computes which forwards of a step."""

from hypothesis import given
from hypothesis import strategies as st

from custom_components.distributed.dealing import dealt


@given(st.lists(st.integers(1, 4096), max_size=40), st.integers(1, 9))
def test_every_forward_is_dealt_to_one_rank_and_full_rounds_are_even(num_tokens, num_ranks):
    shares = dealt(num_tokens, num_ranks)
    assert len(shares) == num_ranks
    assert sorted(number for share in shares for number in share) == list(range(len(num_tokens)))
    assert all(share == sorted(share) for share in shares)
    assert max(map(len, shares)) <= -(-len(num_tokens) // num_ranks)
    if num_tokens and len(num_tokens) % num_ranks == 0:
        assert {len(share) for share in shares} == {len(num_tokens) // num_ranks}


def test_ranks_are_done_at_about_the_same_time():
    """In the order of the forwards the first rank would have 20 tokens, and the second 11."""
    shares = dealt([10, 1, 10, 10], 2)
    assert sorted(sum([10, 1, 10, 10][number] for number in share) for share in shares) == [11, 20]
    assert sorted(sum([9, 1, 8, 2][number] for number in share) for share in dealt([9, 1, 8, 2], 2)) == [10, 10]


def test_fewer_forwards_than_ranks_leave_some_without_work():
    assert dealt([5], 3) == [[0], [], []]
    assert dealt([], 2) == [[], []]
