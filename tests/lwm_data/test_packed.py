"""Rows: the drawing of packed.py, and what holds for any of them."""

from __future__ import annotations

import numpy as np
import pytest

from lwm_data.format.example import Example, Run
from lwm_data.format.packed import Piece, pack_row


def _run(ids: list[int], *, trained: bool, is_vision: bool = False) -> Run:
    return Run(np.array(ids, np.int32), is_vision, trained)


def _drawn() -> list[Example]:
    """ "ab|CD" and "e|F" with BOS 90 and EOS 91; here, as in the drawing, the EOS of the first is trained, and of
    the second only F is."""
    first = (_run([90, 1, 2], trained=False), _run([3, 4, 91], trained=True))
    second = (_run([90, 5], trained=False), _run([6], trained=True))
    return [Example("s", "first", 0, first), Example("s", "second", 0, second)]


def test_a_row_is_as_drawn_in_the_docstring() -> None:
    first, second = _drawn()
    row = pack_row([Piece(first, 0, 6), Piece(second, 0, 3)], 10, "masked", "example")
    arrays = row.arrays()
    third = np.float32(1 / 3)
    assert arrays["tokens"].tolist() == [90, 1, 2, 3, 4, 91, 90, 5, 6, 0]
    assert arrays["segment_ids"].tolist() == [1, 1, 1, 1, 1, 1, 2, 2, 2, 0]
    assert arrays["position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 0]
    assert arrays["vision_mask"].tolist() == [False] * 10
    assert arrays["loss_weights"].tolist() == [0, 0, 0, third, third, third, 0, 0, 1, 0]
    assert [arrays[name].dtype for name in ("tokens", "segment_ids", "position_ids")] == [np.int32] * 3
    assert arrays["loss_weights"].dtype == np.float32 and arrays["vision_mask"].dtype == bool
    assert row.runs.tolist() == [[3, 1, 0], [3, 1, 0], [2, 2, 0], [1, 2, 0], [1, 0, 0]]


def test_token_weighting_gives_every_trained_token_weight_one() -> None:
    first, second = _drawn()
    row = pack_row([Piece(first, 0, 6), Piece(second, 0, 3)], 10, "masked", "token")
    assert row.arrays()["loss_weights"].tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1, 0]


def test_a_naive_row_is_one_segment_and_never_trains_its_first_token() -> None:
    first, second = _drawn()
    row = pack_row([Piece(first, 4, 6), Piece(second, 0, 3)], 6, "naive", "token")
    arrays = row.arrays()
    assert arrays["tokens"].tolist() == [4, 91, 90, 5, 6, 0]
    assert arrays["segment_ids"].tolist() == [1, 1, 1, 1, 1, 0]
    assert arrays["position_ids"].tolist() == [0, 1, 2, 3, 4, 0]
    assert arrays["loss_weights"].tolist() == [0, 1, 0, 0, 1, 0]


def test_an_example_is_never_empty() -> None:
    with pytest.raises(ValueError, match="without tokens"):
        Example("s", "k", 0, (_run([], trained=False),))
