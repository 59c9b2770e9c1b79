"""The counts of a dataset as the lines, bars and histograms of its page.

source     records ... tokens    share    loss     fill
novels          10    281,736    44.2%   25.6%    99.9%        share of all tokens, of all loss weights, of its rows
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lwm_data.format.dataset import DatasetInfo
from lwm_data.report.charts import Histogram, log_histograms, share_histogram
from lwm_data.report.counts import Counts
from lwm_data.report.page_text import shown

COLOURS = 8
SOURCES = 100  # told apart in a page; their sum tells of all
BARS = 40  # of the mix: shards, or groups of them
REASONS = 60


@dataclass(frozen=True)
class SourceLine:
    """A source in the table. shares and fill: of what was counted; None where there is nothing to tell."""

    name: str
    colour: int
    numbers: list[int]
    share: float
    loss_share: float | None
    fill: float | None


@dataclass(frozen=True)
class MixBar:
    """Shards of the mix. parts: (start, width, colour, title) in percent of their rows' slots."""

    name: str
    fill: float
    parts: list[tuple[float, float, int, str]]


@dataclass(frozen=True)
class CountBar:
    """One number of several that are compared. width: percent of the largest."""

    of: str
    name: str
    number: int
    width: float
    colour: int | None


def source_lines(info: DatasetInfo, counts: Counts) -> list[SourceLine]:
    if info.packing == "naive" and info.loss_weighting == "example":  # a cut example is on several lines
        loss = np.array([of.examples if of.trained_tokens else 0 for of in info.sources.values()])
    else:
        loss = counts.loss
    all_loss, all_tokens = int(loss.sum()), max(info.num_tokens, 1)
    return [
        SourceLine(
            name=shown(name),
            colour=number % COLOURS,
            numbers=[
                *(of.records, of.kept, of.split, of.truncated, of.rejected, of.left_out),
                *(of.examples, of.tokens, of.vision_tokens, of.trained_tokens),
            ],
            share=of.tokens / all_tokens,
            loss_share=int(loss[number]) / all_loss if all_loss else None,
            fill=float(counts.row_fills[number] / counts.rows[number]) if counts.rows[number] else None,
        )
        for number, (name, of) in enumerate(info.sources.items())
    ]


def reason_bars(info: DatasetInfo) -> list[CountBar]:
    bars: list[tuple[str, str, int, int | None]] = [
        (shown(name), shown(reason), number, at % COLOURS)
        for at, (name, of) in enumerate(info.sources.items())
        for reason, number in of.reasons.items()
    ]
    if not bars:  # an index of before has no reasons by source
        bars = [("", shown(reason), number, None) for reason, number in info.rejected.items()]
    return count_bars(bars[:REASONS])


def count_bars(numbers: list[tuple[str, str, int, int | None]]) -> list[CountBar]:
    most = max((number for _, _, number, _ in numbers), default=0)
    return [CountBar(of, name, n, round(100 * n / max(most, 1), 2), colour) for of, name, n, colour in numbers]


def length_histograms(info: DatasetInfo, counts: Counts) -> list[Histogram]:
    names = [
        (
            shown(name),
            f"{counts.examples[at]:,} examples, {counts.tokens[at] / counts.examples[at]:,.0f} tokens on average, "
            f"{counts.longest[at]:,} the longest",
            at % COLOURS,
        )
        for at, name in enumerate(info.sources)
        if counts.examples[at]
    ]
    held = counts.lengths[counts.examples > 0]
    return log_histograms(held[:SOURCES], names[:SOURCES], "tokens")


def fill_histogram(counts: Counts) -> Histogram:
    rows = int(counts.fills.sum())
    note = f"{rows:,} rows, {counts.num_full / max(rows, 1):.1%} of them without padding, the emptiest "
    return share_histogram(counts.fills, "row fill", f"{note}{counts.emptiest:.1%} full")


def depth_histograms(info: DatasetInfo, counts: Counts) -> list[Histogram]:
    return [
        share_histogram(counts.depths[at], shown(name), f"{int(counts.depths[at].sum()):,} questions", at % COLOURS)
        for at, name in enumerate(info.sources)
        if counts.depths[at].any()
    ][:SOURCES]


def mix_bars(info: DatasetInfo, counts: Counts) -> list[MixBar]:
    names = list(info.sources)
    bars = []
    for held in np.array_split(np.arange(len(counts.shards)), min(BARS, len(counts.shards))):
        first, last = int(counts.shards[held[0]]), int(counts.shards[held[-1]])
        tokens = counts.mix[held].sum(axis=0)
        slots = info.row_length * sum(info.shards[number].num_rows for number in counts.shards[held].tolist())
        at, parts = 0.0, []
        for number in np.flatnonzero(tokens).tolist():
            share = 100 * int(tokens[number]) / slots
            title = f"{shown(names[number])}: {int(tokens[number]):,} tokens, {share:.1f}% of the rows"
            parts.append((round(at, 3), round(share, 3), number % COLOURS, title))
            at += share
        bars.append(MixBar(str(first) if first == last else f"{first}–{last}", at / 100, parts))
    return bars
