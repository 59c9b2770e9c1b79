"""The order in which examples are packed: each source shuffled, and all of them spread evenly, by their shares.

source a (6 tokens in all)   a0 a0 a0 a1 a1 a1         each example stands at its middle's place in its source,
source b (3 tokens in all)        b0       b1 b1       counted from 0 to 1
order                        a0   b0  a1   b1

So any stretch of the order holds the sources in proportion, to within an example of each, and so do its rows and
shards, the first and the last as well; a plain shuffle would hold them so only on average.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int32, Int64, UInt64


def mixed_order(
    sources: Int32[np.ndarray, " n"],
    lengths: Int64[np.ndarray, " n"],
    shares: Sequence[float | None],
    share_by: Literal["tokens", "examples"],
    seed: int,
) -> Int64[np.ndarray, " m"]:
    """The examples (numbers of `lengths`) in the order to pack them, a function of the arguments.

    sources: of each example, a number of `shares`. shares: in proportion to one another, or None for all there is; with
    shares, the scarcest source is taken whole and of the others as much as its share asks, so that m <= n.
    """
    members = [np.flatnonzero(sources == source) for source in range(len(shares))]
    amounts = lengths.astype(np.float64) if share_by == "tokens" else np.ones(len(lengths))
    totals = [float(amounts[inside].sum()) for inside in members]
    # A source without examples limits nothing: its records are bad, or its rows too short, and the build has said so.
    wanted = [total / share for total, share in zip(totals, shares, strict=True) if share is not None and total]
    whole = min(wanted, default=0.0)
    order, places = [], []
    for source, (inside, share) in enumerate(zip(members, shares, strict=True)):
        shuffled = inside[_shuffle(len(inside), seed, source)]
        ends = np.cumsum(amounts[shuffled])
        place = (ends - amounts[shuffled] / 2) / (totals[source] if share is None else whole * share)
        kept = int(np.searchsorted(place, 1.0))
        order.append(shuffled[:kept])
        places.append(place[:kept])
    return np.concatenate(order)[np.argsort(np.concatenate(places), kind="stable")]


def hashed(seed: str, start: int, stop: int) -> UInt64[np.ndarray, " n"]:
    """Numbers start..stop as splitmix64 of a key from `seed`; ours, so that no library can change it."""
    key = np.uint64(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little"))
    x = np.arange(start + 1, stop + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def _shuffle(count: int, seed: int, source: int) -> Int64[np.ndarray, " n"]:
    """A permutation of 0..count - 1."""
    return np.argsort(hashed(f"{seed}/{source}", 0, count), kind="stable")
