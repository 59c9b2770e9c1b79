"""Packing, from lengths alone."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_data import pack as packing
from lwm_data.pack import ALONE, best_fit, concatenate_and_cut, pack

LENGTHS = st.lists(st.integers(1, 50), max_size=300)


@given(lengths=LENGTHS, open_rows=st.integers(1, 9))
def test_best_fit_puts_each_example_in_one_row_that_holds_it(lengths: list[int], open_rows: int) -> None:
    rows = list(best_fit(np.array(lengths, np.int64), 50, open_rows))
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[number] for number in row) <= 50 for row in rows)


@given(lengths=LENGTHS)
def test_best_fit_takes_the_open_row_that_is_left_fullest(lengths: list[int]) -> None:
    """Against a plain search over all open rows."""
    open_rows: list[list[int]] = []
    closed = []
    for number, length in enumerate(lengths):
        room = [50 - sum(lengths[i] for i in row) for row in open_rows]
        fitting = [i for i in range(len(open_rows)) if room[i] >= length]
        if fitting:
            chosen = open_rows[min(fitting, key=lambda i: room[i])]
        else:
            if len(open_rows) == 4:
                closed.append(sorted(open_rows.pop(min(range(4), key=lambda i: room[i]))))
            chosen = []
            open_rows.append(chosen)
        chosen.append(number)
        if sum(lengths[i] for i in chosen) == 50:
            closed.append(sorted(chosen))
            open_rows = [row for row in open_rows if row is not chosen]

    def shape(
        rows: list[list[int]],
    ) -> list[list[int]]:  # rows of equal room are told apart by age or slot: compare sizes
        return sorted(sorted(lengths[i] for i in row) for row in rows)

    got = list(best_fit(np.array(lengths, np.int64), 50, 4))
    fills = sorted(sum(lengths[i] for i in row) for row in got)
    assert fills == sorted(sum(lengths[i] for i in row) for row in [*closed, *open_rows])
    assert sum(map(len, shape(got))) == len(lengths)


def test_best_fit_fills_above_999_permille_and_memory_is_bounded() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(6.5, 1.3, 200_000), 8, 32768).astype(np.int64)
    tracemalloc.start()
    num_rows = sum(1 for _ in best_fit(lengths, 32768))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert lengths.sum() / (num_rows * 32768) > 0.999
    assert peak < 16 << 20


def test_best_fit_refuses_what_no_row_holds() -> None:
    for lengths in ([5, 51], [0, 3]):
        with pytest.raises(ValueError, match="do not fit rows of 50"):
            list(best_fit(np.array(lengths), 50))


@given(lengths=LENGTHS, row_length=st.integers(1, 70))
def test_concatenate_and_cut_keeps_every_token_in_order(lengths: list[int], row_length: int) -> None:
    rows = list(concatenate_and_cut(np.array(lengths, np.int64), row_length))
    tokens = [(number, at) for row in rows for number, start, stop in row for at in range(start, stop)]
    assert tokens == [(number, at) for number, length in enumerate(lengths) for at in range(length)]
    sizes = [sum(stop - start for _, start, stop in row) for row in rows]
    assert all(size == row_length for size, _ in pairwise(sizes))
    assert not sizes or 0 < sizes[-1] <= row_length


@given(lengths=st.lists(st.integers(1, 50), max_size=600), waiting=st.integers(3, 20))
def test_rows_come_in_the_order_of_their_first_examples_and_none_waits_long(lengths: list[int], waiting: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WAITING_ROWS", waiting)
        rows = list(best_fit(np.array(lengths, np.int64), 50, 3))
    firsts = [row[0] for row in rows]
    assert firsts == sorted(firsts)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    for i, row in enumerate(rows):  # at most `waiting` rows were begun after this one when it took its last example
        assert sum(first < row[-1] for first in firsts[i + 1 :]) <= waiting


@given(
    examples=st.lists(st.tuples(st.integers(1, 50), st.sampled_from([0, 1, ALONE])), max_size=200),
    is_naive=st.booleans(),
)
def test_a_row_holds_examples_of_one_group_and_each_token_is_in_one_row(
    examples: list[tuple[int, int]], is_naive: bool
) -> None:
    lengths = np.array([length for length, _ in examples], np.int64)
    groups = np.array([max(group, 0) if is_naive else group for _, group in examples], np.int32)
    rows = list(pack(lengths, groups, 50, "naive" if is_naive else "masked"))
    tokens = sorted((number, at) for row in rows for number, start, stop in row for at in range(start, stop))
    assert tokens == [(number, at) for number, length in enumerate(lengths.tolist()) for at in range(length)]
    for row in rows:
        (group,) = {int(groups[number]) for number, _, _ in row}
        assert len(row) == 1 or group != ALONE
        assert sum(stop - start for _, start, stop in row) <= 50
    firsts = [row[0][0] for row in rows]
    assert firsts == sorted(firsts)
