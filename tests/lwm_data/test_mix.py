"""The order of examples: shuffled within a source, spread evenly over the whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_data.build import build
from lwm_data.format.dataset import open_dataset
from lwm_data.mix import mixed_order

EXAMPLES = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), min_size=1, max_size=300)


@given(examples=EXAMPLES, seed=st.integers(0, 3), by_tokens=st.booleans())
def test_any_beginning_of_the_order_holds_the_sources_in_proportion(
    examples: list[tuple[int, int]], seed: int, by_tokens: bool
) -> None:
    sources, lengths = (np.array(column) for column in zip(*examples, strict=True))
    order = mixed_order(sources, lengths, [None] * 3, "tokens" if by_tokens else "examples", seed)
    assert sorted(order.tolist()) == list(range(len(examples)))
    amounts = lengths if by_tokens else np.ones(len(lengths))
    total = amounts.sum()
    for source in range(3):
        of = amounts * (sources == source)
        wanted = np.cumsum(amounts[order]) * of.sum() / total
        # Off by no more than an example of each source, the largest there is.
        assert np.abs(np.cumsum(of[order]) - wanted).max() <= 3 * amounts.max()


@given(examples=EXAMPLES, shares=st.lists(st.integers(1, 5), min_size=3, max_size=3))
def test_shares_take_the_scarcest_source_whole_and_of_the_others_what_is_in_proportion(
    examples: list[tuple[int, int]], shares: list[int]
) -> None:
    sources, lengths = (np.array(column) for column in zip(*examples, strict=True))
    order = mixed_order(sources, lengths, shares, "tokens", 0)
    assert len(set(order.tolist())) == len(order)
    there = [lengths[sources == source].sum() for source in range(3)]
    taken = [lengths[order][sources[order] == source].sum() for source in range(3)]
    whole = min(total / share for total, share in zip(there, shares, strict=True) if total)
    for source in range(3):
        if there[source]:
            assert abs(taken[source] - whole * shares[source]) <= lengths.max()
    assert any(taken[source] == there[source] for source in range(3) if there[source])


def test_the_order_is_a_function_of_the_seed_and_no_two_seeds_agree() -> None:
    sources, lengths = np.zeros(1000, np.int32), np.full(1000, 7)
    first, again, other = (mixed_order(sources, lengths, [None], "tokens", seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.abs(np.corrcoef(first, np.arange(1000))[0, 1]) < 0.1


def _share_of(folder: Path, source: str, rows: slice) -> float:
    """Of the tokens of these rows."""
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "shard-000000.examples.parquet").to_pandas()
    inside = table[table["row"].isin(range(10**6)[rows])]
    return float(inside.loc[inside["source"] == source, "num_tokens"].sum() / inside["num_tokens"].sum())


def test_first_and_last_rows_have_the_mix_of_the_shares(project: Callable[..., Path]) -> None:
    sources = [
        {"name": "books", "type": "books", "path": "books/*.txt", "share": 0.75},
        {"name": "chats", "type": "chats", "path": "chats.jsonl", "share": 0.25},
    ]
    result = build(project(sources=sources, row_length=64, shard_size=10**6))
    rows = result.info.num_rows
    for part in (slice(0, rows), slice(0, rows // 4), slice(rows - rows // 4, rows)):
        assert _share_of(result.out, "chats", part) == pytest.approx(0.25, abs=0.08)
    assert result.info.sources["books"].left_out > 0
    assert result.info.sources["chats"].left_out == 0


def test_rows_of_a_source_that_is_packed_apart_hold_nothing_else(project: Callable[..., Path]) -> None:
    sources = [
        {"name": "books", "type": "books", "path": "books/*.txt", "pack_with": "none"},
        {"name": "chats", "type": "chats", "path": "chats.jsonl", "pack_with": "own"},
        {"name": "needles", "type": "needles", "count": 20, "haystack": "books/*.txt", "tokens": 200},
    ]
    result = build(project(sources=sources, shard_size=10**6))
    import pyarrow.parquet as pq

    table = pq.read_table(result.out / "shard-000000.examples.parquet").to_pandas()
    of_rows = table.groupby("row")["source"]
    assert (of_rows.nunique() == 1).all()
    assert (table[table["source"] == "books"].groupby("row").size() == 1).all()
    assert table[table["source"] == "chats"].groupby("row").size().max() > 1
    assert len(open_dataset(result.out)) == table["row"].nunique()
