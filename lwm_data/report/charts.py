"""Histograms and bars as numbers for a page. Places are in percent of the plot: x from the left, y from the top.

log_bin      1 2 3 4 6 8 11 16 ...    half an octave each: bin b begins at 2^(b/2)
fill bins    0-5% ... 95-100%
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

LOG_BINS = 64  # to 2^32
FILL_BINS = 20
X_TICKS, Y_TICKS = 8, 3


@dataclass(frozen=True)
class Bar:
    """x, width, height: percent. A bar of few is drawn high enough to be seen."""

    x: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Histogram:
    """ticks: (place, label). colour: number of the source, or None. note: what a caption says beside the name."""

    name: str
    note: str
    colour: int | None
    bars: list[Bar]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def log_bin(values: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """The bin of each value; what is below 1 is in the first."""
    # Half octaves are exact at powers of two, which log2 gives exactly.
    bins = np.floor(2 * np.log2(np.maximum(values, 1))).astype(np.int64)
    found: np.ndarray = np.minimum(bins, LOG_BINS - 1)
    return found


def log_histograms(
    counts: Int64[np.ndarray, "n bins"], names: Sequence[tuple[str, str, int | None]], unit: str
) -> list[Histogram]:
    """One histogram for each (name, note, colour), all on one axis of lengths."""
    used = np.flatnonzero(counts.sum(axis=0))
    if not len(used):
        return []
    low = int(used[0]) // 2 * 2
    high = max(int(used[-1]) + 1, low + 4)
    span = high - low
    every = 2 * max(1, -(-span // (2 * X_TICKS)))
    x_ticks = [(round(100 * (b - low) / span, 2), _short(1 << (b // 2))) for b in range(low, high + 1, every)]
    histograms = []
    for (name, note, colour), line in zip(names, counts, strict=True):
        most = int(line.max())
        bars = [
            Bar(
                x=round(100 * (b - low) / span, 2),
                width=round(100 / span, 2),
                height=_height(int(line[b]), most),
                title=f"{_edge(b):,} to {max(_edge(b + 1) - 1, _edge(b)):,} {unit}: {int(line[b]):,}",
            )
            for b in range(low, high)
            if line[b]
        ]
        histograms.append(Histogram(name, note, colour, bars, x_ticks, _y_ticks(most)))
    return histograms


def share_histogram(counts: Int64[np.ndarray, " bins"], name: str, note: str, colour: int | None = None) -> Histogram:
    """A histogram of shares from 0 to 100%."""
    num, most = len(counts), int(counts.max(initial=0))
    bars = [
        Bar(
            x=round(100 * b / num, 2),
            width=round(100 / num, 2),
            height=_height(int(counts[b]), most),
            title=f"{100 * b / num:g} to {100 * (b + 1) / num:g}%: {int(counts[b]):,}",
        )
        for b in range(num)
        if counts[b]
    ]
    return Histogram(name, note, colour, bars, [(float(x), f"{x}%") for x in range(0, 101, 20)], _y_ticks(most))


def _edge(b: int) -> int:
    """The least whole number of bin b."""
    return 1 << (b // 2) if b % 2 == 0 else math.isqrt((1 << b) - 1) + 1


def _height(value: int, most: int) -> float:
    return round(max(100 * value / (1.04 * most), 0.8), 2)


def _y_ticks(most: int) -> list[tuple[float, str]]:
    """0 and some round numbers up to `most`."""
    if not most:
        return []
    rough = most / Y_TICKS
    power = 10 ** math.floor(math.log10(rough)) if rough >= 1 else 1
    step = next((power * m for m in (1, 2, 5) if power * m >= rough), 10 * power)
    return [(round(100 - 100 * y / (1.04 * most), 2), f"{y:,}") for y in range(0, most + 1, int(step))]


def _short(number: int) -> str:
    for power, letter in ((30, "G"), (20, "M"), (10, "K")):
        if number >= 1 << power:
            return f"{number >> power}{letter}"
    return str(number)
