"""The page of a dataset, and that of a run of question answering.

    index.json ----------------> what came of the records, by source
    examples.parquet ----------> lengths, fill, the mix of each shard          counts.py, charts.py
    rows drawn by a seed ------> strips, text, pictures                        rows.py
    rejected.jsonl ------------> some records of each reason                   rejected.py
                 |  report.html.j2 (escapes all that it is given), report.css, report.js
                 v
            one file

The page may run its own script and nothing else: its policy names that script by its hash, and allows no request.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from lwm_data.format.atomic import write_whole
from lwm_data.format.dataset import Dataset, DatasetInfo
from lwm_data.report.charts import Histogram, log_histograms, share_histogram
from lwm_data.report.counts import Counts, count
from lwm_data.report.page_text import cut_text, shown
from lwm_data.report.pairs import MEASURES, PairFiles, read_pairs
from lwm_data.report.rejected import read_rejected
from lwm_data.report.rows import MAX_ROWS, draw_row, sample_rows
from lwm_data.summary import fill
from lwm_data.terminal import Progress
from lwm_data.vision.page_pictures import Pictures

COLOURS = 8
SOURCES = 100  # told apart in a page; their sum tells of all
BARS = 40  # of the mix: shards, or groups of them
REASONS = 60
MANIFEST = 40_000  # characters


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


def write_dataset_page(path: Path, dataset: Dataset, num_rows: int, seed: int) -> dict[str, Any]:
    """Write the page of `dataset` to `path`, whole or not at all; what a script may want to know of it.

    ValueError where num_rows is out of bounds, or the dataset is damaged.
    """
    if not 0 <= num_rows <= MAX_ROWS:
        raise ValueError(f"--rows: got {num_rows}; wanted 0 to {MAX_ROWS}")
    info = dataset.info
    with Progress("count", min(len(info.shards), 256), "shards") as progress:
        counts = count(dataset, advance=progress.advance)
    pictures = Pictures()
    chosen = sample_rows(dataset, num_rows, seed)
    rows = []
    with Progress("draw", len(chosen), "rows") as progress:
        for row in chosen:
            rows.append(draw_row(dataset, row, len(chosen), pictures))
            progress.advance(1)
    rejected = read_rejected(dataset.url)
    names = list(info.sources)[:SOURCES]
    page = _render(
        "dataset.html.j2",
        title=shown(info.name),
        info=info,
        fill=fill(info),
        url=shown(dataset.url),
        lines=_lines(info, counts)[:SOURCES],
        num_sources=len(info.sources),
        colours={shown(name): number % COLOURS for number, name in enumerate(names)},
        num_read=len(counts.shards),
        reasons=_reasons(info),
        lengths=_lengths(info, counts),
        fills=_fills(counts),
        depths=_depths(info, counts),
        mix=_mix(info, counts),
        rows=rows,
        seed=seed,
        no_pictures=[shown(why, 400) for why in pictures.problems.values()],
        rejected=rejected,
        manifest=cut_text(json.dumps(info.manifest, indent=1, ensure_ascii=False), MANIFEST),
    )
    size = _write(path, page)
    return {
        "out": str(path),
        "bytes": size,
        "dataset": dataset.url,
        "fingerprint": info.fingerprint,
        "shards": len(info.shards),
        "shards_counted": len(counts.shards),
        "examples_counted": int(counts.examples.sum()),
        "rows": chosen,
        "pictures": sum(run.picture is not None for row in rows for of in row.segments for run in of.runs),
        "rejected_listed": len(rejected.records),
        "problems": [row.problem for row in rows if row.problem] + list(pictures.problems.values()),
        "sources": {
            line.name: {"share": line.share, "loss_share": line.loss_share, "fill": line.fill}
            for line in _lines(info, counts)
        },
    }


def write_pairs_page(path: Path, files: PairFiles, num_pairs: int, seed: int) -> dict[str, Any]:
    """Write the page of a run of question answering to `path`; what a script may want to know of it. ValueError as
    `read_pairs` says."""
    if not 0 <= num_pairs <= MAX_ROWS:
        raise ValueError(f"--rows: got {num_pairs}; wanted 0 to {MAX_ROWS}")
    counts, kept, wrong = read_pairs(files, num_pairs, seed)
    measures = [(name, _spread(line), None) for name, line in zip(MEASURES, counts.lengths, strict=True)]
    page = _render(
        "pairs.html.j2",
        title=f"Questions and answers: {shown(files.pairs.parent.name)}",
        files=files,
        counts=counts,
        lengths=[
            histogram
            for line, measure in zip(counts.lengths, measures, strict=True)
            for histogram in log_histograms(line[np.newaxis], [measure], measure[0].split()[0])
        ],
        depths=share_histogram(counts.depths, "place of the evidence in its book", _of(counts.depths)),
        reasons=_bars([("", name, number, None) for name, number in counts.rejected.most_common(REASONS)]),
        books=_bars([("", shown(name), number, None) for name, number in counts.books.most_common(30)]),
        models=[shown(name) for name, _ in counts.models.most_common(5)],
        kept=kept,
        wrong=wrong,
        seed=seed,
    )
    size = _write(path, page)
    return {
        "out": str(path),
        "bytes": size,
        "pairs": counts.num_pairs,
        "shown": len(kept),
        "books": len(counts.books),
        "rejected": dict(sorted(counts.rejected.items())),
        "without_evidence": sum(bool(pair.problem) for pair in kept),
    }


def _render(template: str, **content: Any) -> str:
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = "\n" + (here / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = (here / "report.css").read_text(encoding="utf-8")
    own = {"script": Markup(script), "style": Markup(style), "script_hash": digest}  # files of ours, no data
    return environment.get_template(template).render(**own, **content)


def _write(path: Path, page: str) -> int:
    data = page.encode("utf-8", "replace")  # JSON can spell half of a surrogate pair, which UTF-8 cannot
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data)
    return len(data)


def _lines(info: DatasetInfo, counts: Counts) -> list[SourceLine]:
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


def _reasons(info: DatasetInfo) -> list[CountBar]:
    bars = [
        (shown(name), shown(reason), number, at % COLOURS)
        for at, (name, of) in enumerate(info.sources.items())
        for reason, number in of.reasons.items()
    ]
    if not bars:  # an index of before has no reasons by source
        bars = [("", shown(reason), number, None) for reason, number in info.rejected.items()]
    return _bars(bars[:REASONS])


def _bars(numbers: list[tuple[str, str, int, int | None]]) -> list[CountBar]:
    most = max((number for _, _, number, _ in numbers), default=0)
    return [CountBar(of, name, n, round(100 * n / max(most, 1), 2), colour) for of, name, n, colour in numbers]


def _lengths(info: DatasetInfo, counts: Counts) -> list[Histogram]:
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


def _fills(counts: Counts) -> Histogram:
    rows = int(counts.fills.sum())
    note = f"{rows:,} rows, {counts.num_full / max(rows, 1):.1%} of them without padding, the emptiest "
    return share_histogram(counts.fills, "row fill", f"{note}{counts.emptiest:.1%} full")


def _depths(info: DatasetInfo, counts: Counts) -> list[Histogram]:
    return [
        share_histogram(counts.depths[at], shown(name), f"{int(counts.depths[at].sum()):,} questions", at % COLOURS)
        for at, name in enumerate(info.sources)
        if counts.depths[at].any()
    ][:SOURCES]


def _mix(info: DatasetInfo, counts: Counts) -> list[MixBar]:
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


def _spread(line: np.ndarray) -> str:
    return f"{int(line.sum()):,} pairs"


def _of(depths: np.ndarray) -> str:
    return f"{int(depths.sum()):,} pairs of the books that were read"
