"""Packing from lengths alone: documents per second, fill, and how rows mix, beside axolotl's and TRL's packers.

    lognormal    1,000,000 documents of 8 to 32,768 tokens into rows of 32,768
    near         100,000 book chunks of 0.3 to 1 row: the hard case
    mixed        texts, pictures and videos into rows of 1,048,576: which rows hold no vision at all

The peers take part where they are installed: `pip install --no-deps axolotl trl numba llvmlite accelerate psutil`. All
packers see the same lengths in one run, in turn, and each time is the best of `--rounds`. Ratios are to ours.
"""

from __future__ import annotations

import argparse
import importlib
import time
import tracemalloc
from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Callable

import numpy as np

from lwm_data.mix import mixed_order
from lwm_data.pack import best_fit

Rows = list[list[int]]
ROW = 32_768
LONG_ROW = 1_048_576
GROUP = 100_000  # documents that axolotl packs at a time


def ours(lengths: np.ndarray, row_length: int) -> Rows:
    """The build's own: best fit over 64 open rows."""
    return list(best_fit(lengths, row_length))


def best_fit_decreasing(lengths: np.ndarray, row_length: int) -> Rows:
    """Offline: longest first, into the fullest row of all that has room."""
    rows: Rows = []
    free: list[tuple[int, int]] = []
    for i in np.argsort(-lengths, kind="stable").tolist():
        need = int(lengths[i])
        at = bisect_left(free, (need, 0))
        room, row = free.pop(at) if at < len(free) else (row_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        if room > need:
            insort(free, (room - need, row))
    return rows


def axolotl() -> Callable[[np.ndarray, int], Rows] | None:
    """axolotl's first fit, compiled by numba, in groups as its sampler calls it."""
    try:
        pack_group = importlib.import_module("axolotl.utils.samplers.multipack").pack_group
    except ImportError:
        return None
    pack_group(np.array([3, 4, 5]), 0, 8, 3, 3)  # compiles

    def run(lengths: np.ndarray, row_length: int) -> Rows:
        rows: Rows = []
        for at in range(0, len(lengths), GROUP):
            group = lengths[at : at + GROUP]
            rows += pack_group(group, at, row_length, len(group), len(group))
        return rows

    return run


def trl() -> Callable[[np.ndarray, int], Rows] | None:
    """TRL's plan: best fit decreasing over its segment tree, without the tokens that it moves besides."""
    try:
        tree_of = importlib.import_module("trl.data_utils")._SegmentTree
    except ImportError:
        return None

    def run(lengths: np.ndarray, row_length: int) -> Rows:
        tree = tree_of(row_length)
        tree.add(row_length)
        with_room: dict[int, deque[list[int]]] = defaultdict(deque)
        rows: Rows = []
        for i in np.argsort(-lengths, kind="stable").tolist():
            need = int(lengths[i])
            room = tree.search(need)
            if room < row_length:
                row = with_room[room].popleft()
                if not with_room[room]:
                    tree.remove(room)
            else:
                row = []
                rows.append(row)
            row.append(i)
            if room > need:
                with_room[room - need].append(row)
                tree.add(room - need)
        return rows

    return run


def timed(packers: dict[str, Callable[[np.ndarray, int], Rows]], lengths: np.ndarray, rounds: int) -> None:
    """A line for each packer: documents per second, their ratio to ours, fill."""
    best: dict[str, float] = {}
    rows: dict[str, Rows] = {}
    for _ in range(rounds):
        for name, run in packers.items():
            start = time.perf_counter()
            rows[name] = run(lengths, ROW)
            best[name] = min(best.get(name, np.inf), time.perf_counter() - start)
    for name, seconds in best.items():
        placed = sum(map(len, rows[name]))
        assert placed == len(lengths), f"{name} lost {len(lengths) - placed} documents"
        fill = lengths.sum() / (len(rows[name]) * ROW)
        ratio = best["ours"] / seconds
        print(f"  {name:22} {len(lengths) / seconds / 1e6:6.2f}M docs/s  {ratio:5.2f} of ours  {fill:8.3%} full, 0 cut")


def mixed_rows(packers: dict[str, Callable[[np.ndarray, int], Rows]], rng: np.random.Generator) -> None:
    """A line for each packer: fill, and the rows without any vision and their vision's spread."""
    kinds = {
        "texts": np.clip(rng.lognormal(8.5, 1.5, 40_000), 64, LONG_ROW),
        "pictures": rng.integers(280, 420, 400_000),
        "videos": 257 * rng.integers(8, 120, 12_000) + rng.integers(20, 90, 12_000),
    }
    lengths = np.concatenate(list(kinds.values())).astype(np.int64)
    sources = np.repeat(np.arange(3), [len(of) for of in kinds.values()])
    order = mixed_order(sources, lengths, [None] * 3, "tokens", seed=0)
    lengths, is_vision = lengths[order], sources[order] > 0
    share = lengths[is_vision].sum() / lengths.sum()
    print(f"mixed: {len(lengths):,} examples, {share:.1%} of the tokens from pictures and videos, rows of {LONG_ROW:,}")
    for name, run in packers.items():
        rows = run(lengths, LONG_ROW)
        shares = np.array([lengths[row][is_vision[row]].sum() / lengths[row].sum() for row in map(np.array, rows)])
        fill = lengths.sum() / (len(rows) * LONG_ROW)
        print(
            f"  {name:22} {fill:8.3%} full; no vision in {np.mean(shares == 0):6.2%} of {len(rows):,} rows; vision's "
            f"share of a row {shares.mean():.2f} +- {shares.std():.2f}; of the first 20 rows {shares[:20].mean():.2f}, "
            f"of the last {shares[-20:].mean():.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--documents", type=int, default=1_000_000)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    found = {"ours": ours, "axolotl first fit": axolotl(), "TRL segment tree": trl()}
    packers = {name: run for name, run in found.items() if run is not None}
    for name in found.keys() - packers.keys():
        print(f"{name}: not installed")

    lengths = np.clip(rng.lognormal(6.5, 1.3, options.documents), 8, ROW).astype(np.int64)
    print(f"lognormal: {len(lengths):,} documents into rows of {ROW:,}")
    timed(packers, lengths, options.rounds)
    tracemalloc.start()
    for _ in best_fit(lengths, ROW):
        pass
    print(f"  ours, memory held while rows stream by: {tracemalloc.get_traced_memory()[1] / 2**20:.1f} MiB")
    tracemalloc.stop()

    near = (ROW * rng.uniform(0.3, 1.0, options.documents // 10)).astype(np.int64)
    print(f"near: {len(near):,} chunks of 0.3 to 1 row")
    timed({"ours": ours, "best fit decreasing": best_fit_decreasing}, near, options.rounds)

    mixed_rows({"ours": ours, "best fit decreasing": best_fit_decreasing}, rng)


if __name__ == "__main__":
    main()
