"""Plans of which rows share a forward."""

import math
import random
from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from custom_components.datasets.packing import grouped_by_length, pack_rows

CAPACITIES = st.integers(1, 64)
LENGTHS_AND_CAPACITY = CAPACITIES.flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=200), st.just(capacity))
)
SEEDS = st.integers(0, 2**40)
EPOCHS = st.integers(0, 2**19)


def instruction_lengths(num_rows: int, longest: int) -> list[int]:
    """Lengths spread like those of an instruction data set: around 90 tokens, with a long tail."""
    draws = random.Random(0)
    return [min(max(round(draws.lognormvariate(math.log(65), 0.8)), 8), longest) for _ in range(num_rows)]


def shuffled_rows(num_rows: int, seed: int = 0) -> list[int]:
    return random.Random(seed).sample(range(num_rows), num_rows)


def num_tokens(pack: list[int], lengths: list[int]) -> int:
    return sum(lengths[row] for row in pack)


@given(LENGTHS_AND_CAPACITY, SEEDS, EPOCHS, st.booleans())
def test_every_row_is_in_one_pack_and_no_pack_is_too_full(lengths_and_capacity, seed, epoch, shuffle):
    lengths, capacity = lengths_and_capacity
    packs = pack_rows(lengths, capacity, seed, epoch, shuffle)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    assert all(0 < num_tokens(pack, lengths) <= capacity for pack in packs)
    assert packs == pack_rows(tuple(lengths), capacity, seed, epoch, shuffle)


@given(LENGTHS_AND_CAPACITY, SEEDS, EPOCHS, st.booleans())
def test_any_two_packs_hold_more_than_the_capacity(lengths_and_capacity, seed, epoch, shuffle):
    lengths, capacity = lengths_and_capacity
    sizes = sorted(num_tokens(pack, lengths) for pack in pack_rows(lengths, capacity, seed, epoch, shuffle))
    assert len(sizes) < 2 or sizes[0] + sizes[1] > capacity


@given(LENGTHS_AND_CAPACITY)
def test_each_row_goes_where_it_fits_best(lengths_and_capacity):
    lengths, capacity = lengths_and_capacity
    rooms: list[int] = []
    for length in lengths:
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append(min(fitting, default=capacity) - length)
    packs = pack_rows(lengths, capacity, seed=0, epoch=0, shuffle=False)
    assert sorted(capacity - num_tokens(pack, lengths) for pack in packs) == sorted(rooms)


@given(LENGTHS_AND_CAPACITY, SEEDS, EPOCHS)
def test_unshuffled_packs_follow_the_data_set_in_every_epoch(lengths_and_capacity, seed, epoch):
    lengths, capacity = lengths_and_capacity
    packs = pack_rows(lengths, capacity, seed, epoch, shuffle=False)
    assert packs == pack_rows(lengths, capacity, seed=0, epoch=0, shuffle=False)
    assert all(pack == sorted(pack) for pack in packs)
    assert packs == sorted(packs)


def test_unshuffled_a_row_that_fits_several_packs_equally_well_joins_the_nearest():
    assert pack_rows([3, 3, 3, 1, 4, 1], 4, seed=0, epoch=0, shuffle=False) == [[0], [1, 5], [2, 3], [4]]


@pytest.mark.parametrize("varied", ["seed", "epoch"])
def test_the_incomplete_pack_comes_anywhere_in_an_epoch(varied):
    places = set()
    for value in range(50):
        packs = pack_rows([1] * 130, 64, **{"seed": 0, "epoch": 0, varied: value}, shuffle=True)
        places.add([len(pack) for pack in packs].index(2))
    assert places == {0, 1, 2}


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("capacity", [512, 1024, 2048])
def test_packs_of_an_instruction_data_set_are_full(capacity, shuffle):
    lengths = instruction_lengths(50_000, longest=min(capacity, 1024))
    packs = pack_rows(lengths, capacity, seed=3, epoch=1, shuffle=shuffle)
    assert sum(lengths) >= 0.98 * len(packs) * capacity


@pytest.mark.parametrize(("seed", "epoch"), [(3, 2), (4, 1), (1, 3)])
def test_seed_and_epoch_change_the_packs_and_their_order(seed, epoch):
    lengths = instruction_lengths(2000, longest=512)
    packs = pack_rows(lengths, 512, seed=3, epoch=1, shuffle=True)
    others = pack_rows(lengths, 512, seed=seed, epoch=epoch, shuffle=True)
    # A row that fills a pack alone meets nobody in any epoch.
    compositions, other_compositions = ({frozenset(pack) for pack in plan if len(pack) > 1} for plan in (packs, others))
    assert len(compositions & other_compositions) < 0.05 * len(compositions)
    single_rows = [pack for pack in packs if len(pack) == 1]
    assert len(single_rows) > 3
    assert single_rows != [pack for pack in others if len(pack) == 1]


def test_rows_of_every_length_meet_in_a_pack_and_packs_are_not_sorted():
    lengths = instruction_lengths(20_000, longest=1024)
    packs = pack_rows(lengths, 2048, seed=0, epoch=0, shuffle=True)
    # Packs of rows drawn at random would have nearly all of the rows' own deviation inside them.
    assert fmean(pstdev([lengths[row] for row in pack]) for pack in packs) > 0.8 * pstdev(lengths)
    mean_lengths = [fmean(lengths[row] for row in pack) for pack in packs]
    quarter = len(packs) // 4
    for start in range(0, 4 * quarter, quarter):
        assert fmean(mean_lengths[start : start + quarter]) == pytest.approx(fmean(mean_lengths), rel=0.1)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    ("length", "num_rows_per_pack"), [(64, 1), (33, 1), (32, 2), (1, 64)], ids=["full", "over half", "half", "one"]
)
def test_rows_of_one_length(length, num_rows_per_pack, shuffle):
    packs = pack_rows([length] * 1000, 64, seed=0, epoch=0, shuffle=shuffle)
    assert len(packs) == math.ceil(1000 / num_rows_per_pack)
    assert sorted(map(len, packs))[1:] == [num_rows_per_pack] * (len(packs) - 1)


def test_no_rows():
    assert pack_rows([], 64, seed=0, epoch=0, shuffle=True) == []
    assert grouped_by_length([], [], batch_size=4) == []


@pytest.mark.parametrize("length", [0, 65])
def test_a_row_that_cannot_stand_in_a_pack_is_refused(length):
    with pytest.raises(AssertionError):
        pack_rows([1, length], 64, seed=0, epoch=0, shuffle=True)


@given(st.integers(0, 700), st.integers(1, 5), SEEDS)
def test_grouping_sorts_windows_and_keeps_every_row_in_its_own(num_rows, batch_size, seed):
    lengths = random.Random(seed).choices(range(1, 30), k=num_rows)
    order = shuffled_rows(num_rows, seed)
    grouped = grouped_by_length(order, lengths, batch_size)
    assert grouped == grouped_by_length(tuple(order), tuple(lengths), batch_size)
    for start in range(0, len(order), 50 * batch_size):
        window = grouped[start : start + 50 * batch_size]
        assert sorted(window) == sorted(order[start : start + 50 * batch_size])
        batches = [window[place : place + batch_size] for place in range(0, len(window), batch_size)]
        batch_lengths = [[lengths[row] for row in batch] for batch in batches]
        # Put back in order of length, the batches are the sorted window. By the mean, as batches may share lengths.
        batch_lengths.sort(key=lambda batch: (fmean(batch), batch[-1]), reverse=True)
        assert sum(batch_lengths, []) == sorted((lengths[row] for row in window), reverse=True)


@given(st.integers(0, 300), st.integers(1, 7), SEEDS)
def test_grouping_rows_of_one_length_changes_nothing(num_rows, batch_size, seed):
    order = shuffled_rows(num_rows, seed)
    assert grouped_by_length(order, [5] * num_rows, batch_size) == order


def test_grouping_takes_part_of_a_data_set():
    assert grouped_by_length([5, 0, 3, 2], [10, 99, 20, 11, 99, 21], batch_size=2) == [5, 2, 3, 0]


def test_groups_are_alike_inside_and_not_sorted_among_themselves():
    lengths = instruction_lengths(20_000, longest=1024)
    grouped = grouped_by_length(shuffled_rows(len(lengths)), lengths, batch_size=8)
    batches = [[lengths[row] for row in grouped[start : start + 8]] for start in range(0, len(grouped), 8)]
    assert fmean(map(pstdev, batches)) < 0.1 * pstdev(lengths)
    # 50 batches are a window, and 25 its first half: sorted, its mean would be far above that of the second.
    first_halves = [fmean(batch) for place, batch in enumerate(batches) if place % 50 < 25]
    assert fmean(first_halves) == pytest.approx(fmean(lengths), rel=0.1)
