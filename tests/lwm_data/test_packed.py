"""Rows: the drawing of packed.py, and what holds for any of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_data.format.example import Example, Run
from lwm_data.format.packed import LossWeighting, PackedSequence, Packing, Piece, merge_runs, pack_row


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
    assert row.weights.tolist() == [0, third, 0, 1, 0]


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


def test_a_plain_text_is_one_run_as_drawn() -> None:
    text = Example("s", "text", 0, (_run([90], trained=False), _run([1, 2, 3, 4, 91], trained=True)))
    row = pack_row([Piece(text, 0, 6)], 6, "masked", "example")
    fifth = np.float32(1 / 5)
    assert row.runs.tolist() == [[6, 1, 0]] and row.weights.tolist() == [fifth]
    assert row.arrays()["loss_weights"].tolist() == [0, fifth, fifth, fifth, fifth, fifth]
    assert row.arrays(1, 3)["loss_weights"].tolist() == [fifth, fifth]
    assert row.trained_lengths.tolist() == [5]


@st.composite
def _examples(draw: st.DrawFn) -> list[Example]:
    """Of runs of any modality, trained or not, the first token never; some runs are empty."""
    examples = []
    for number in range(draw(st.integers(1, 5))):
        shape = draw(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans()), max_size=5))
        runs = [_run([90], trained=False)]
        runs += [_run([1] * size, is_vision=is_vision, trained=trained) for size, is_vision, trained in shape]
        examples.append(Example("s", f"key{number}", 0, tuple(runs)))
    return examples


@given(
    examples=_examples(),
    cut=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    weighting=st.sampled_from(["example", "token"]),
    padding=st.integers(0, 2),
)
def test_a_row_has_the_arrays_of_its_tokens_in_the_fewest_runs(
    examples: list[Example], cut: tuple[int, int], weighting: LossWeighting, padding: int
) -> None:
    """Masked rows of whole examples, and naive rows that begin and end anywhere, against lists made token by token."""
    weight_of = [1 / max(1, example.num_trained) if weighting == "example" else 1 for example in examples]
    flat = [
        (number, run.is_vision, weight * run.trained)
        for number, (example, weight) in enumerate(zip(examples, weight_of, strict=True), start=1)
        for run in example.runs
        for _ in run.tokens
    ]
    begin, end = sorted(min(at, len(flat)) for at in cut)
    packings: list[tuple[Packing, int, int]] = [("masked", 0, len(flat)), ("naive", begin, end)]
    for packing, start, stop in packings:
        if start == stop:
            continue
        pieces, at = [], 0
        for example in examples:
            inside = max(0, start - at), min(example.num_tokens, stop - at)
            at += example.num_tokens
            if inside[0] < inside[1]:
                pieces.append(Piece(example, *inside))
        row = pack_row(pieces, stop - start + padding, packing, weighting)
        arrays, held = row.arrays(), flat[start:stop]
        segments = [number if packing == "masked" else 1 for number, *_ in held]
        weights = [0.0 if segments[i] != (segments[i - 1] if i else 0) else held[i][2] for i in range(len(held))]
        assert arrays["segment_ids"].tolist() == segments + [0] * padding
        assert arrays["vision_mask"].tolist() == [is_vision for _, is_vision, _ in held] + [False] * padding
        np.testing.assert_array_equal(arrays["loss_weights"], np.array(weights + [0.0] * padding, np.float32))
        assert int(row.trained_lengths.sum()) == sum(weight > 0 for weight in weights)
        columns = zip(arrays["segment_ids"], arrays["vision_mask"], arrays["loss_weights"], strict=True)
        tokens = [tuple(column.item() for column in token) for token in columns]
        fewest, before = 0, None  # greedily: a run ends where the next token cannot be of it
        for i, (segment, is_vision, weight) in enumerate(tokens):
            is_first = i == 0 or tokens[i - 1][0] != segment
            same = before is not None and before[:2] == (segment, is_vision) and before[2] in (None, weight)
            fewest += not same
            before = (segment, is_vision, None if is_first and segment else weight)
        assert len(row.runs) == fewest


def test_merging_runs_again_changes_nothing() -> None:
    first, second = _drawn()
    row = pack_row([Piece(first, 0, 6), Piece(second, 0, 3)], 10, "masked", "example")
    runs = np.array([[1, 1, 0], [2, 1, 0], [3, 1, 0], [1, 2, 0], [1, 2, 0], [1, 2, 0], [1, 0, 0]], np.uint32)
    unmerged = PackedSequence(row.tokens, runs, row.weights[[0, 0, 1, 2, 2, 3, 4]])
    for of in (unmerged, row):
        merged, weights = merge_runs(of.runs, of.weights)
        assert merged.tolist() == row.runs.tolist() and weights.tolist() == row.weights.tolist()


def test_an_example_is_never_empty() -> None:
    with pytest.raises(ValueError, match="without tokens"):
        Example("s", "k", 0, (_run([], trained=False),))
