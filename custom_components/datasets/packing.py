"""The order of an epoch's rows, and which of them share a forward, from the rows' lengths alone.

Lengths and capacities are in tokens. A plan is a pure function of its arguments, so a checkpoint does not store it. No
row is split.
"""

import random
from bisect import bisect_left, insort
from collections.abc import Sequence

import torch

# Batches in one window of rows sorted by length: transformers' largest default, `get_length_grouped_indices` in
# trainer_pt_utils.py (5.23.0).
_NUM_BATCHES_PER_WINDOW = 50


def row_order(num_rows: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """Draw the order of the rows in an epoch, counted from 0."""
    if not shuffle:
        return list(range(num_rows))
    generator = torch.Generator().manual_seed(seed * 2**20 + epoch)
    return torch.randperm(num_rows, generator=generator).tolist()


def pack_rows(lengths: Sequence[int], capacity: int, seed: int, epoch: int, shuffle: bool) -> list[list[int]]:
    """Put every row of an epoch into one pack of at most `capacity` tokens.

    Online best fit (BF in Johnson, Demers, Ullman, Garey and Graham, "Worst-case performance bounds for simple
    one-dimensional packing algorithms", SIAM J. Comput. 3(4), 1974, section 1): row by row, in the epoch's order, into
    the fullest pack that still has room for it, or into a new pack if none has. It never needs more than 1.7 times the
    fewest packs possible plus 2 (theorem 2.2 there); rows much shorter than the capacity leave almost no space empty.

    Taking the longest rows first, as best fit decreasing does, and as Krell et al. do over a histogram of lengths
    ("Efficient sequence packing without cross-contamination", arXiv 2107.02027, section 3.1.1), fills packs a little
    better, but with rows of similar length: a few long ones here, hundreds of short ones there. With a shuffled order a
    pack is still nearly a random draw of rows.

    Args:
        lengths: tokens of each row, from 1 to `capacity`.
        capacity: the most tokens of a pack.
        seed: determines, with `epoch`, which rows share a pack, and the order of the packs.
        epoch: counted from 0.
        shuffle: False packs the rows in the data set's order, the same in every epoch: packs are ordered by their
            first row, rows ascend in each pack, and most keep their neighbours, but a row that fills a gap goes to an
            earlier pack, however far back.

    Returns:
        Packs of row indices. Any two of them hold more than `capacity` tokens together, so all but one are more than
        half full. Their number may differ by epoch.
    """
    assert all(0 < length <= capacity for length in lengths), (min(lengths), max(lengths), capacity)
    packs: list[list[int]] = []
    open_packs: dict[int, list[int]] = {}  # by the number of tokens they still have room for
    rooms: list[int] = []  # the keys of open_packs, ascending
    for row in row_order(len(lengths), seed, epoch, shuffle):
        tightest = bisect_left(rooms, lengths[row])
        if tightest == len(rooms):
            pack, room = len(packs), capacity
            packs.append([])
        else:
            room = rooms[tightest]
            # The one that got a row most recently: in the data set's order this keeps neighbours together.
            pack = open_packs[room].pop()
            if not open_packs[room]:
                del open_packs[room], rooms[tightest]
        packs[pack].append(row)
        room -= lengths[row]
        if room in open_packs:
            open_packs[room].append(pack)
        elif room:
            open_packs[room] = [pack]
            insort(rooms, room)
    if shuffle:
        # The last packs opened are less full, and tend to begin with a long row that fitted nowhere.
        # Not by row_order, which would repeat the draws for the rows.
        random.Random(f"packs of seed {seed}, epoch {epoch}").shuffle(packs)
    return packs


def grouped_by_length(order: Sequence[int], lengths: Sequence[int], batch_size: int) -> list[int]:
    """Reorder rows so that each batch of `batch_size` consecutive rows has rows of similar length.

    After `get_length_grouped_indices` of transformers (trainer_pt_utils.py): windows of 50 batches are sorted by
    length, longest first. There the batches keep that order, and every window runs from long rows to short ones; here
    batches are ordered by the place their earliest row had before. An incomplete batch stays last, or it would shift
    the batches after it.

    Nothing is drawn: a shuffled order gives batches in a shuffled order, another epoch's order gives other batches,
    and rows of one length stay where they are.

    Rows joined end to end have no padding to save, and forwards differ more in size than in the given order, up to a
    forward of long rows only: for forwards of even size, see :func:`pack_rows`.

    Args:
        order: row indices, each at most once.
        lengths: tokens of each row of the data set, by row index.
        batch_size: rows of a forward.

    Returns:
        The indices of `order`, each once.
    """
    window_size = _NUM_BATCHES_PER_WINDOW * batch_size
    places = {row: place for place, row in enumerate(order)}
    batches = []
    for window_start in range(0, len(order), window_size):
        window = sorted(order[window_start : window_start + window_size], key=lambda row: -lengths[row])
        batches += [window[start : start + batch_size] for start in range(0, len(window), batch_size)]
    batches.sort(key=lambda batch: (len(batch) < batch_size, min(places[row] for row in batch)))
    return [row for batch in batches for row in batch]
