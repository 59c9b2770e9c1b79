"""The lines of a report: metrics on one axis of steps over all stages, as SVG paths and labels in percent.

metrics.jsonl   {"stage": "short", "step": 1, ...}        a resumed run may write a step twice: the later counts
                {"stage": "long", "step": 1, ...}
x               1 2 ... 200 | 201 202 ...                 steps of a stage follow those of the stage before
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

POINTS = 600  # of a line; a longer run is thinned
Metrics = list[dict[str, Any]]  # the objects of the file, each with `x`
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """Lines over the steps of all stages. Places are in percent of the plot: x from the left, y from the top.

    lines: (name, style, SVG path). ticks: (place, label). marks: (x, y, label). levels: (y, label).
    borders: (x, stage that begins there).
    """

    lines: list[tuple[str, str, str]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[tuple[float, float, str]]
    levels: list[tuple[float, str]]
    borders: list[tuple[float, str]]


def read_metrics(*paths: Path) -> Metrics:
    """The steps of the files in turn, each with `x`, its number over all stages; two files share no stage."""
    steps: dict[tuple[int, str, int], dict[str, Any]] = {}
    for file_number, path in enumerate(paths):
        lines = path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip():
                    step = json.loads(line)
                    steps[file_number, step["stage"], step["step"]] = step
            except (ValueError, KeyError, TypeError) as error:
                if number < len(lines):  # the last line of a run that was killed may be cut
                    raise ValueError(f"{path}:{number}: not a line of metrics: {error!r}") from error
    stages = list(dict.fromkeys((file_number, stage) for file_number, stage, _ in steps))
    ordered = sorted(steps.items(), key=lambda item: (stages.index(item[0][:2]), item[0][2]))
    first, last = 0, 0
    before: tuple[int, str] | None = None
    for key, step in ordered:
        if key[:2] != before:
            first, before = last, key[:2]
        step["x"] = last = first + step["step"]
    return [step for _, step in ordered]


def loss_chart(
    metrics: Metrics, heldout_points: Sequence[tuple[str, int, float]], levels: Sequence[tuple[str, float]]
) -> Chart | None:
    """Training loss by step, held-out points (stage, step, loss), and level lines (name, loss)."""
    text, weighted, vision = (_points(metrics, key) for key in ("text_loss", "loss", "vision_loss"))
    starts = {stage: x for x, stage in _stage_starts(metrics)}
    marks = [(float(starts.get(stage, 0) + step), loss, f"{loss:.3f}") for stage, step, loss in heldout_points]
    lines = [("each step", "raw", text), ("text loss per token, smoothed", "main", _smooth(metrics, "text_loss"))]
    if any(abs(a[1] - b[1]) > 1e-6 for a, b in zip(weighted, text, strict=False)):
        lines.append(("weighted loss, which is minimised", "second", _smooth(metrics, "loss")))
    if vision:
        lines.append(("vision loss per code", "third", _smooth(metrics, "vision_loss")))
    measured = [(step["x"], step["heldout"].get("text_loss")) for step in metrics if step.get("heldout")]
    if heldout := [(x, float(loss)) for x, loss in measured if loss is not None]:
        lines.append(("held-out text, while training", "heldout", heldout))
    return _chart(metrics, lines, marks, [(loss, f"{name} {loss:.3f}") for name, loss in levels], 7)


def rate_chart(metrics: Metrics) -> Chart | None:
    """The learning rate by step."""
    return _chart(metrics, [("learning rate", "main", _points(metrics, "lr"))], [], [(0.0, "")], 2)


def share_chart(metrics: Metrics) -> Chart | None:
    """How much of the loss is on vision, by step, in percent; None where none of it is."""
    if not any(step.get("vision_share") for step in metrics):
        return None
    percent: Metrics = []
    for step in metrics:
        share = step.get("vision_share")
        if share is None:  # of a step without a trained token, or written before shares were
            percent.append(step)
            continue
        text, vision = (1 - share) * (step.get("text_loss") or 0), share * (step.get("vision_loss") or 0)
        of_loss = 100 * vision / (text + vision) if text + vision else None
        percent.append(step | {"of_weights": 100 * share, "of_loss": of_loss})
    lines = [
        ("vision, of the loss's weights", "third", _smooth(percent, "of_weights")),
        ("vision, of the loss", "second", _smooth(percent, "of_loss")),
    ]
    return _chart(metrics, lines, [], [(0.0, "")], 4, unit="%")


def mean_share(metrics: Metrics) -> float | None:
    """The vision's part of the loss's weights, over all steps that know it; None where none of it is vision."""
    shares = [y for _, y in _points(metrics, "vision_share")]
    return float(np.mean(shares)) if any(shares) else None


def median_speed(metrics: Metrics) -> float | None:
    """Tokens a second of the median step."""
    speeds = [y for _, y in _points(metrics, "tokens_per_s")]
    return float(np.median(speeds)) if speeds else None


def _chart(
    metrics: Metrics,
    lines: list[tuple[str, str, Points]],
    marks: list[tuple[float, float, str]],
    levels: list[tuple[float, str]],
    num_ticks: int,
    unit: str = "",
) -> Chart | None:
    """None where there is nothing to draw."""
    heights = [y for _, _, points in lines for _, y in points]
    if not heights:
        return None
    heights += [y for _, y, _ in marks] + [y for y, _ in levels]
    low, high = min(heights), max(heights)
    low, high = (low - 0.04 * (high - low), high + 0.04 * (high - low)) if high > low else (low - 1, high + 1)
    x_max = max([step["x"] for step in metrics] + [x for x, _, _ in marks] + [1])

    def x_at(x: float) -> float:
        return round(100 * x / x_max, 3)

    def y_at(y: float) -> float:
        return round(100 * (high - y) / (high - low), 3)

    return Chart(
        lines=[
            (name, style, "M" + "L".join(f"{x_at(x)} {y_at(y)}" for x, y in _thin(points)))
            for name, style, points in lines
            if points
        ],
        x_ticks=[(x_at(x), f"{x:,.0f}") for x in _ticks(0, x_max, 5)],
        y_ticks=[(y_at(y), f"{y:g}{unit}") for y in _ticks(low, high, num_ticks)],
        marks=[(x_at(x), y_at(y), label) for x, y, label in marks],
        levels=[(y_at(y), label) for y, label in levels if label],
        borders=[(x_at(x), stage) for x, stage in _stage_starts(metrics)],
    )


def _points(metrics: Metrics, key: str) -> Points:
    values = ((step["x"], step.get(key)) for step in metrics)
    return [(x, float(value)) for x, value in values if value is not None and math.isfinite(value)]


def _smooth(metrics: Metrics, key: str) -> Points:
    """A running mean over about a hundredth of the steps, anew in each stage."""
    keep = 1 - 1 / max(1.0, len(metrics) / 100)
    smooth: Points = []
    first, total, weight = 0, 0.0, 0.0
    for step in metrics:
        if step["x"] - step["step"] != first:
            first, total, weight = step["x"] - step["step"], 0.0, 0.0
        value = step.get(key)
        if value is not None and math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
            smooth.append((step["x"], total / weight))
    return smooth


def _thin(points: Points) -> Points:
    every = -(-len(points) // POINTS)
    return points[::every] + points[-1:] * bool((len(points) - 1) % every)


def _stage_starts(metrics: Metrics) -> list[tuple[int, str]]:
    """(steps before it, name) of every stage."""
    starts: list[tuple[int, str]] = []
    for step in metrics:
        start = (step["x"] - step["step"], step["stage"])
        if not starts or starts[-1] != start:
            starts.append(start)
    return starts


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers between low and high, about `wanted` of them."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
