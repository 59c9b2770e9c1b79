"""The verb of lwm-data that writes a page about a dataset, or about questions and answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lwm_data.cli_output import where
from lwm_data.terminal import progress_as_json


def report(
    target: Annotated[
        str, typer.Argument(metavar="DATASET", help="Folder or URL of a dataset; or a run of `lwm-data qa`.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page; by default DATASET-report.html beside DATASET.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows, or pairs, to draw.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Which ones.")] = 0,
    books: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Of a run of `qa`: its books, as its manifest names them.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Write one HTML page about a dataset: tables, lengths, fill, mix, random rows with pictures, rejected records.

    Example: `lwm-data report runs/demo/dataset --rows 20`

    The page loads nothing. Of a run of `lwm-data qa` (its manifest, its folder or its file of pairs) it shows pairs
    beside the text that they were asked about.
    """
    from lwm_data.format.dataset import INDEX, open_dataset
    from lwm_data.report.page import write_dataset_page, write_pairs_page
    from lwm_data.report.pairs import find_pairs

    is_url = "://" in target
    if out is not None and (out.is_dir() or "://" in str(out)):
        raise ValueError(f"--out: got {out}; wanted the name of a file on a disk")
    pairs = None if is_url or (Path(target) / INDEX).is_file() else find_pairs(Path(target), books)
    if pairs is None and books is not None:
        raise ValueError(f"--books: {target} is no run of `lwm-data qa`; wanted its manifest, folder or file of pairs")
    if pairs is not None:
        beside = pairs.pairs.resolve().parent
    else:
        beside = Path(target.rstrip("/").rpartition("/")[2]) if is_url else Path(target).resolve()
    page = out or beside.with_name(f"{beside.name}-report.html")
    with progress_as_json(as_json):
        if pairs is not None:
            told = write_pairs_page(page, pairs, rows, seed)
        else:
            told = write_dataset_page(page, open_dataset(target), rows, seed)
    if as_json:
        print(json.dumps(told))
    else:
        print(where(page))
