"""Which example goes in which row, and nothing else: from lengths alone, as a stream.

best_fit   example  0    1   2      row of 10:   [0 0 0 0 0 0 2 2 2 2] [1 1 1 1 1 1 1 . . .]
           length   6    7   4      each into the open row that it leaves fullest; when all are too full, the fullest
                                    is closed and a new one opened

concatenate_and_cut                 [0 0 0 0 0 0 1 1 1 1] [1 1 1 2 2 2 2 . . .]
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64

OPEN_ROWS = 64
CHUNK = 1 << 16  # lengths turned to Python numbers at a time

Cut = tuple[int, int, int]
"""(example, start, stop): tokens start..stop of an example."""


def best_fit(lengths: Int64[np.ndarray, " n"], row_length: int, open_rows: int = OPEN_ROWS) -> Iterator[list[int]]:
    """Rows of examples (numbers of `lengths`), none of them cut, each example in one row.

    Only `open_rows` rows are held at a time, so memory does not grow, and a row mixes what stands near each other in
    the input's order. ValueError where a length is below 1 or above `row_length`.
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
    number = 0
    for at in range(0, len(lengths), CHUNK):  # _numbers, but without a generator's cost per example
        for need in (lengths[at : at + CHUNK].astype(np.int64) << bits).tolist():
            i = bisect_left(free, need)
            if i < len(free):
                left = free.pop(i) - need
                slot = left & mask
                rows[slot].append(number)
                if left > mask:
                    insort(free, left, 0, i)
                else:
                    yield rows[slot]
                    rows[slot] = []
                    unused.append(slot)
            else:
                if not unused:
                    slot = free.pop(0) & mask
                    yield rows[slot]
                else:
                    slot = unused.pop()
                rows[slot] = [number]
                left = whole - need + slot
                if left > mask:
                    insort(free, left)
                else:
                    yield rows[slot]
                    rows[slot] = []
                    unused.append(slot)
            number += 1
    for left in free:
        yield rows[left & mask]


def concatenate_and_cut(lengths: Int64[np.ndarray, " n"], row_length: int) -> Iterator[list[Cut]]:
    """Rows of cuts: the examples one after another, cut wherever a row is full; the last row may be short."""
    row: list[Cut] = []
    room = row_length
    for number, length in enumerate(_numbers(lengths)):
        start = 0
        while start < length:
            stop = min(length, start + room)
            row.append((number, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield row
                row, room = [], row_length
    if row:
        yield row


def _numbers(lengths: Int64[np.ndarray, " n"]) -> Iterator[int]:
    for at in range(0, len(lengths), CHUNK):
        yield from lengths[at : at + CHUNK].tolist()
