"""Which row goes where is a function of seed and row, even where it is cut, and true to documents and shares."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_data import row_choice
from lwm_data.format.dataset import Dataset
from lwm_data.format.example import text_runs
from lwm_data.format.vocab import TextTokenizer
from lwm_data.mix import hashed
from lwm_data.row_choice import drawn, mixed_rows, parts_by_document
from lwm_data.sources.record import Record

ROW = 600


@given(data=st.data(), num_rows=st.integers(1, 12))
def test_documents_are_grouped_as_a_search_from_row_to_row_groups_them(data: st.DataObject, num_rows: int) -> None:
    cells = st.tuples(st.integers(0, num_rows - 1), st.integers(0, num_rows - 1))
    pairs = data.draw(st.lists(cells, max_size=12))
    left, right = (np.array([pair[side] for pair in pairs], np.int64) for side in (0, 1))
    got = row_choice._first_of_group(num_rows, left, right)
    for row in range(num_rows):
        reached, before = {row}, set[int]()
        while reached != before:
            before = set(reached)
            reached |= {b for a, b in pairs if a in reached} | {a for a, b in pairs if b in reached}
        assert got[row] == min(reached)


def test_large_documents_are_shared_out_too(
    dataset_of: Callable[..., Dataset], demo_tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    """Ten documents of four rows and forty of one: a tenth of each kind, so no kind is missing from the small part."""
    ids = np.full(ROW - 2, 9, np.int32)
    runs = text_runs(demo_tokenizer, [(ids, True)], eos=True)
    keys = [f"large{i // 4}" for i in range(40)] + [f"small{i}" for i in range(40)]
    dataset = dataset_of(tmp_path, [Record(key, runs) for key in keys], row_length=ROW)
    parts, num_groups, largest = parts_by_document(dataset, (0.9, 0.1), seed=3)
    assert (num_groups, largest, int((parts == 1).sum())) == (50, 4, 8)
    assert (parts[:40] == 1).sum() == 4 and (parts[40:] == 1).sum() == 4
    again, _, _ = parts_by_document(dataset, (0.9, 0.1), seed=4)
    assert (again != parts).any(), "which documents they are is a function of the seed"


@given(nums=st.lists(st.integers(1, 300), min_size=2, max_size=4), seed=st.integers(0, 9), cut=st.floats(0, 1))
def test_wherever_mixed_rows_are_cut_each_dataset_has_its_share(nums: list[int], seed: int, cut: float) -> None:
    inputs, rows = (np.concatenate(column) for column in zip(*mixed_rows(nums, seed), strict=True))
    for i, num in enumerate(nums):
        assert rows[inputs == i].tolist() == list(range(num)), "each row once, in order"
    stop = int(cut * sum(nums))
    for i, num in enumerate(nums):
        assert abs((inputs[:stop] == i).sum() - stop * num / sum(nums)) <= len(nums)


def test_draws_are_even_and_the_same_however_they_are_cut() -> None:
    draws = drawn("7", 0, 100_000)
    assert draws.min() >= 0 and draws.max() < 1 and abs(draws.mean() - 0.5) < 0.01
    assert np.histogram(draws, 10, (0, 1))[0].min() > 9_500
    np.testing.assert_array_equal(drawn("7", 500, 600), draws[500:600])
    assert (drawn("8", 0, 100) != draws[:100]).all()


def _row_of(wanted: int, key: int) -> int:
    """The number that splitmix64 with this key takes to `wanted`: its steps, backwards."""

    def unshifted(x: int, shift: int) -> int:
        y = x
        for _ in range(64 // shift):
            y = x ^ (y >> shift)
        return y

    x = unshifted(wanted, 31)
    for factor, shift in ((0x94D049BB133111EB, 27), (0xBF58476D1CE4E5B9, 30)):
        x = unshifted(x * pow(factor, -1, 1 << 64) % (1 << 64), shift)
    return int((x - key) * pow(0x9E3779B97F4A7C15, -1, 1 << 64) % (1 << 64)) - 1


@pytest.mark.parametrize("wanted", [0, 1, (1 << 64) - 512, (1 << 64) - 1])
def test_a_draw_is_below_1_whatever_the_hash(wanted: int) -> None:
    row = _row_of(wanted, int.from_bytes(hashlib.sha256(b"7").digest()[:8], "little"))
    assert hashed("7", row, row + 1)[0] == wanted
    assert 0 <= drawn("7", row, row + 1)[0] < 1
