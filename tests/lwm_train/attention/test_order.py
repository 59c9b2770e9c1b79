"""Orders are permutations that depend on the row alone, and `dealt` is as balanced as a ring can be.

The critical path is counted here a second time, from the mask itself, token by token.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_train.attention import token_order
from lwm_train.attention.balance import critical_path, hop_work
from lwm_train.attention.dispatch import choose_schedule
from lwm_train.attention.order import ORDERS

ROW, DEVICES, TILE = 32768, 8, 128
SOURCES = {"chat": (600, 1.0), "web": (1000, 1.5), "books": (8000, 1.0)}


def lognormal_row(median: float, sigma: float, seed: int, length: int = ROW) -> np.ndarray:
    lengths = 1 + np.random.default_rng(seed).lognormal(np.log(median), sigma, size=length // 50).astype(int)
    return np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)[:length]


def balance(order: str, segment_ids: np.ndarray) -> float:
    work = hop_work(token_order(order, segment_ids, DEVICES, TILE), segment_ids, DEVICES, TILE)
    return critical_path(work) / float(work.sum() / DEVICES)


def live_tiles_by_the_mask(order: np.ndarray, segment_ids: np.ndarray, num_devices: int, tile: int) -> np.ndarray:
    """Tiles with at least one live pair, counted from the full mask in row order: [devices, hops]."""
    index = np.arange(len(order))
    mask = (segment_ids[:, None] == segment_ids[None, :]) & (index[:, None] >= index[None, :]) & (segment_ids > 0)
    mask = mask[order][:, order]
    tiles = len(order) // tile
    live = mask.reshape(tiles, tile, tiles, tile).any(axis=(1, 3))
    per_device = live.reshape(num_devices, tiles // num_devices, num_devices, -1).sum(axis=(1, 3))
    return np.array(
        [[per_device[d, (d - hop) % num_devices] for hop in range(num_devices)] for d in range(num_devices)]
    )


@given(
    lengths=st.lists(st.integers(1, 400), max_size=20),
    order=st.sampled_from(ORDERS),
    num_devices=st.sampled_from([1, 2, 4, 8]),
)
def test_every_order_is_a_permutation_that_depends_on_the_row_alone(
    lengths: list[int], order: str, num_devices: int
) -> None:
    segment_ids = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)] + [np.zeros(1024)])[:1024]
    segment_ids = segment_ids.astype(np.int32)
    first = token_order(order, segment_ids, num_devices, 64)
    assert first.dtype == np.int32
    assert np.array_equal(np.sort(first), np.arange(1024))
    assert np.array_equal(first, token_order(order, segment_ids.copy(), num_devices, 64))


@pytest.mark.parametrize("order", ["contiguous", "dealt"])
def test_work_counted_from_ranges_is_the_work_of_the_mask(order: str) -> None:
    for seed in range(3):
        segment_ids = lognormal_row(150, 1.2, seed, 2048)
        segment_ids[-200:] = 0
        permutation = token_order(order, segment_ids, 4, 64)
        counted = hop_work(permutation, segment_ids, 4, 64)
        assert np.array_equal(counted, live_tiles_by_the_mask(permutation, segment_ids, 4, 64))


@pytest.mark.parametrize("order", ["zigzag", "striped"])
def test_work_counted_from_ranges_never_misses_a_live_tile(order: str) -> None:
    segment_ids = lognormal_row(150, 1.2, 3, 2048)
    permutation = token_order(order, segment_ids, 4, 64)
    counted = hop_work(permutation, segment_ids, 4, 64)
    assert np.all(counted >= live_tiles_by_the_mask(permutation, segment_ids, 4, 64))


@pytest.mark.parametrize("source", SOURCES)
def test_dealt_rows_wait_less_than_a_twentieth(source: str) -> None:
    rows = [lognormal_row(*SOURCES[source], seed) for seed in range(6)]
    assert max(balance("dealt", row) for row in rows) < 1.05
    assert np.mean([balance("zigzag", row) for row in rows]) > 1.5


def test_dealt_chat_rows_cost_an_eighteenth_of_a_full_causal_ring() -> None:
    full_causal = DEVICES * (ROW // DEVICES // TILE) ** 2  # the last device computes every tile of every hop
    rows = [lognormal_row(*SOURCES["chat"], seed) for seed in range(25)]
    orders = [token_order("dealt", row, DEVICES, TILE) for row in rows]
    paths = [critical_path(hop_work(order, row, DEVICES, TILE)) for order, row in zip(orders, rows, strict=True)]
    assert full_causal / np.mean(paths) > 18


def test_zigzag_and_auto_balance_one_document_exactly() -> None:
    one = np.ones(ROW, np.int32)
    assert balance("zigzag", one) == balance("auto", one) == 1.0
    assert balance("contiguous", one) > 1.8


def test_auto_is_never_dearer_than_what_it_chooses_from() -> None:
    for source, law in SOURCES.items():
        row = lognormal_row(*law, 7)
        for send_cost in (0.0, 1e4):
            costs = {
                order: critical_path(
                    hop_work(token_order(order, row, DEVICES, TILE, send_cost), row, DEVICES, TILE), send_cost
                )
                for order in ("auto", "contiguous", "zigzag", "dealt")
            }
            assert costs["auto"] == min(costs.values()), source


def test_auto_prefers_few_hops_when_sending_is_dear() -> None:
    row = lognormal_row(*SOURCES["chat"], 0)
    assert np.array_equal(token_order("auto", row, DEVICES, TILE, send_cost=1e4), np.arange(ROW))


def test_rows_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ValueError, match="10 tokens cannot be split over sp = 4"):
        token_order("dealt", np.ones(10, np.int32), 4)
    with pytest.raises(ValueError, match="12 tokens are not a multiple of that; use dealt"):
        token_order("zigzag", np.ones(12, np.int32), 4)
    with pytest.raises(ValueError, match="got 'zagzig', wanted one of auto, dealt"):
        token_order("zagzig", np.ones(16, np.int32), 4)


def test_the_schedule_is_chosen_by_whether_a_hop_can_be_hidden() -> None:
    assert choose_schedule(128, 1, 8, 4, "cpu") == "ring"
    assert choose_schedule(16384, 1, 8, 4, "tpu") == "ring"
    assert choose_schedule(2048, 8, 8, 4, "tpu") == "ring"  # eight query heads share a key head: less to send
    assert choose_schedule(2048, 1, 8, 4, "tpu") == "ulysses"
    assert choose_schedule(2048, 1, 2, 4, "tpu") == "allgather"
    assert choose_schedule(2048, 1, 2, 64, "tpu") == "ring"  # nobody should hold the keys of a long row
