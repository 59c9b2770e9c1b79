"""Which example goes in which row, and nothing else: from lengths alone, as a stream.

best_fit   example  0    1   2      row of 10:   [0 0 0 0 0 0 2 2 2 2] [1 1 1 1 1 1 1 . . .]
           length   6    7   4      each into the open row that it leaves fullest; when all are too full, the fullest
                                    is closed and a new one opened

concatenate_and_cut                 [0 0 0 0 0 0 1 1 1 1] [1 1 1 2 2 2 2 . . .]

Rows come in the order of their first examples, so that what stands near in the input stands near in the rows, in the
first and the last as well. A row that others wait for too long is closed as it is.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int32, Int64

from lwm_data.format.packed import Packing

OPEN_ROWS = 64
WAITING_ROWS = 512  # rows that may wait for one opened before them; it is closed then
CHUNK = 1 << 16  # lengths turned to Python numbers at a time
ALONE = -1  # the group of examples that have a row each

Cut = tuple[int, int, int]
"""(example, start, stop): tokens start..stop of an example."""


def pack(
    lengths: Int64[np.ndarray, " n"], groups: Int32[np.ndarray, " n"], row_length: int, packing: Packing
) -> Iterator[list[Cut]]:
    """Rows of examples (numbers of `lengths`), each of one group; examples of group ALONE have a row each.

    Under `masked` no example is cut. Rows come in the order of their first examples.
    """
    streams = (
        _group_rows(lengths, np.flatnonzero(groups == group), row_length, packing, group == ALONE)
        for group in np.unique(groups).tolist()
    )
    return heapq.merge(*streams, key=lambda row: row[0][0])


def best_fit(lengths: Int64[np.ndarray, " n"], row_length: int, open_rows: int = OPEN_ROWS) -> Iterator[list[int]]:
    """Rows of examples (numbers of `lengths`), none of them cut, each example in one row.

    Only `open_rows` rows take examples and only WAITING_ROWS are held at a time, so memory does not grow, and a row
    mixes what stands near each other in the input's order. Rows come in the order of their first examples.
    ValueError where a length is below 1 or above `row_length`.
    """
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= row_length:
        raise ValueError(f"lengths from {lengths.min():,} to {lengths.max():,} do not fit rows of {row_length:,}")
    # An open row is one number, (free tokens << bits) | slot, so that a sorted list of numbers finds the best fit.
    bits = max(1, (open_rows - 1).bit_length())
    mask = (1 << bits) - 1
    whole = row_length << bits
    free: list[int] = []
    rows: list[list[int]] = [[] for _ in range(open_rows)]
    unused = list(range(open_rows - 1, -1, -1))
    waiting: deque[list[int]] = deque()  # every row that is not given out, by its first example
    closed: set[int] = set()  # first examples of those that take no more
    number = 0
    for at in range(0, len(lengths), CHUNK):
        for need in (lengths[at : at + CHUNK].astype(np.int64) << bits).tolist():
            i = bisect_left(free, need)
            if i < len(free):
                left = free.pop(i) - need
                slot = left & mask
                rows[slot].append(number)
            else:
                if unused:
                    slot = unused.pop()
                else:
                    slot = free.pop(0) & mask
                    closed.add(rows[slot][0])
                rows[slot] = [number]
                waiting.append(rows[slot])
                left = whole - need + slot
            if left > mask:
                insort(free, left)
            else:
                closed.add(rows[slot][0])
                unused.append(slot)
            number += 1
            if len(waiting) > WAITING_ROWS and waiting[0][0] not in closed:
                i = next(i for i, other in enumerate(free) if rows[other & mask] is waiting[0])
                closed.add(waiting[0][0])
                unused.append(free.pop(i) & mask)
            while closed and waiting[0][0] in closed:
                row = waiting.popleft()
                closed.remove(row[0])
                yield row
    yield from waiting


def concatenate_and_cut(lengths: Int64[np.ndarray, " n"], row_length: int) -> Iterator[list[Cut]]:
    """Rows of cuts: the examples one after another, cut wherever a row is full; the last row may be short."""
    row: list[Cut] = []
    room = row_length
    number = 0
    for at in range(0, len(lengths), CHUNK):
        for length in lengths[at : at + CHUNK].tolist():
            start = 0
            while start < length:
                stop = min(length, start + room)
                row.append((number, start, stop))
                room -= stop - start
                start = stop
                if not room:
                    yield row
                    row, room = [], row_length
            number += 1
    if row:
        yield row


def _group_rows(
    lengths: Int64[np.ndarray, " n"], members: Int64[np.ndarray, " m"], row_length: int, packing: Packing, alone: bool
) -> Iterator[list[Cut]]:
    """Rows of the examples `members`, by their numbers among all."""
    inside = lengths[members]
    if packing == "naive":
        for cuts in concatenate_and_cut(inside, row_length):
            yield [(int(members[i]), start, stop) for i, start, stop in cuts]
        return
    for row in ([i] for i in range(len(members))) if alone else best_fit(inside, row_length):
        yield [(int(members[i]), 0, int(inside[i])) for i in row]
