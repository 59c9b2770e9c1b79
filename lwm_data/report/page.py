"""The page of a dataset, and that of a run of question answering.

    index.json ----------------> what came of the records, by source
    examples.parquet ----------> lengths, fill, the mix of each shard          counts.py, tables.py
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
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from lwm_data.format.atomic import write_whole
from lwm_data.format.dataset import Dataset
from lwm_data.report.charts import log_histograms, share_histogram
from lwm_data.report.counts import SHARDS, count
from lwm_data.report.page_text import cut_text, shown
from lwm_data.report.pairs import MEASURES, PairFiles, read_pairs
from lwm_data.report.rejected import read_rejected
from lwm_data.report.rows import MAX_ROWS, draw_row, sample_rows
from lwm_data.report.tables import (
    REASONS,
    SOURCES,
    count_bars,
    depth_histograms,
    fill_histogram,
    length_histograms,
    mix_bars,
    reason_bars,
    source_lines,
)
from lwm_data.summary import fill
from lwm_data.terminal import Progress
from lwm_data.vision.page_pictures import Pictures

MANIFEST = 40_000  # characters


def write_dataset_page(path: Path, dataset: Dataset, num_rows: int, seed: int) -> dict[str, Any]:
    """Write the page of `dataset` to `path`, whole or not at all; what a script may want to know of it.

    ValueError where num_rows is out of bounds, or the dataset is damaged.
    """
    if not 0 <= num_rows <= MAX_ROWS:
        raise ValueError(f"--rows: got {num_rows}; wanted 0 to {MAX_ROWS}")
    info = dataset.info
    with Progress("count", min(len(info.shards), SHARDS), "shards") as progress:
        counts = count(dataset, advance=progress.advance)
    pictures = Pictures()
    chosen = sample_rows(dataset, num_rows, seed)
    rows = []
    with Progress("draw", len(chosen), "rows") as progress:
        for row in chosen:
            rows.append(draw_row(dataset, row, len(chosen), pictures))
            progress.advance(1)
    rejected = read_rejected(dataset.url)
    lines = source_lines(info, counts)
    page = _render(
        "dataset.html.j2",
        title=shown(info.name),
        info=info,
        fill=fill(info),
        url=shown(dataset.url),
        lines=lines[:SOURCES],
        num_sources=len(info.sources),
        colours={line.name: line.colour for line in lines[:SOURCES]},
        num_read=len(counts.shards),
        reasons=reason_bars(info),
        lengths=length_histograms(info, counts),
        fills=fill_histogram(counts),
        depths=depth_histograms(info, counts),
        mix=mix_bars(info, counts),
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
            line.name: {"share": line.share, "loss_share": line.loss_share, "fill": line.fill} for line in lines
        },
    }


def write_pairs_page(path: Path, files: PairFiles, num_pairs: int, seed: int) -> dict[str, Any]:
    """Write the page of a run of question answering to `path`; what a script may want to know of it. ValueError as
    `read_pairs` says."""
    if not 0 <= num_pairs <= MAX_ROWS:
        raise ValueError(f"--rows: got {num_pairs}; wanted 0 to {MAX_ROWS}")
    counts, kept, wrong = read_pairs(files, num_pairs, seed)
    measures = [(name, f"{int(line.sum()):,} pairs", None) for name, line in zip(MEASURES, counts.lengths, strict=True)]
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
        depths=share_histogram(
            counts.depths,
            "place of the evidence in its book",
            f"{int(counts.depths.sum()):,} pairs of the books that were read",
        ),
        reasons=count_bars([("", name, number, None) for name, number in counts.rejected.most_common(REASONS)]),
        books=count_bars([("", shown(name), number, None) for name, number in counts.books.most_common(30)]),
        models=[shown(name) for name, _ in counts.models.most_common(5) if name],
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
