"""A whole row as one strip: a block for each run, and a line for the loss weight. Places are in percent of the row.

runs       (novels, 512) (talk, 40, weight 0) (talk, 60, weight 1/60) (padding, 12)
blocks     |---novels---||-talk, pale-||-talk-||.|
weights     ____________               --------        of the row's largest
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lwm_data.report.page_text import shown


@dataclass(frozen=True)
class Block:
    """A run in the strip. start, width: percent of the row; colour: the number of its source, None in padding."""

    start: float
    width: float
    colour: int | None
    is_trained: bool
    is_vision: bool
    title: str


def blocks(
    runs: list[tuple[dict[str, Any], dict[str, Any]]], colours: dict[str, int], length: int, padding: int, most: int
) -> list[Block]:
    """Of each run, given as (segment, run) of a row's view; a row of more than `most` is drawn as seen from afar."""
    edges = [(run["start"], run["start"] + run["num_tokens"]) for _, run in runs]
    if len(runs) > most:
        middles = (np.arange(most) + 0.5) * (length - padding) / most
        chosen = np.searchsorted([stop for _, stop in edges], middles, side="right").tolist()
        edges = [(i * (length - padding) / most, (i + 1) * (length - padding) / most) for i in range(most)]
        runs = [runs[number] for number in chosen]
    found = [
        Block(
            start=_percent(start, length),
            width=_percent(stop - start, length),
            colour=colours[segment["source"]],
            is_trained=run["weight"] > 0,
            is_vision=run["vision"],
            title=f"{shown(segment['source'], 40)}: segment {segment['segment']}, tokens {run['start']:,} to "
            f"{run['start'] + run['num_tokens'] - 1:,}, loss weight {run['weight']:.3g}",
        )
        for (segment, run), (start, stop) in zip(runs, edges, strict=True)
    ]
    if padding:
        begin = length - padding
        title = f"padding: {padding:,} tokens"
        found.append(Block(_percent(begin, length), _percent(padding, length), None, False, False, title))
    return found


def borders(view: dict[str, Any], most: int) -> list[float]:
    """Where segments begin, but for the first; none where that would leave nothing else to see."""
    begins = [segment["runs"][0]["start"] for segment in view["segments"] if segment["runs"]]
    if len(begins) > most // 2:
        return []
    return [_percent(begin, view["row_length"]) for begin in begins[1:]]


def weight_path(runs: list[dict[str, Any]], length: int, most_weight: float, most: int) -> str:
    """An SVG path of the runs' weights; y is 0 at `most_weight`, 100 at none. Of many runs `most` are drawn."""
    every = -(-len(runs) // most)
    path = []
    for run in runs[:: max(every, 1)]:
        height = 100 - 100 * run["weight"] / most_weight if most_weight else 100.0
        stop = run["start"] + run["num_tokens"]
        path += [f"{_percent(run['start'], length)} {height:.1f}", f"{_percent(stop, length)} {height:.1f}"]
    return "M" + "L".join(path) if path else ""


def _percent(part: float, whole: int) -> float:
    return round(100 * part / whole, 3)
