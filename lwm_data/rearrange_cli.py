"""The verbs of lwm-data that make datasets, and files, from datasets. Heavy imports wait inside the verbs.

lwm-data merge | split | subset | export
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lwm_data.cli_output import described, print_view, where

if TYPE_CHECKING:
    from lwm_data.format.dataset import DatasetInfo

rearrange_app = typer.Typer()

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
DatasetFolder = Annotated[str, typer.Argument(metavar="DATASET", help="Folder of a built dataset.")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder to write: new, empty, or of an earlier run of this.")]
Seed = Annotated[int, typer.Option(help="Of what is drawn.")]
Name = Annotated[str | None, typer.Option(help="Name of the new dataset.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes to work in.")]
Rows = Annotated[str | None, typer.Option(metavar="FROM:TO", help="Rows FROM up to, but without, TO: 0:1000 or 500:")]


@rearrange_app.command()
def merge(
    datasets: Annotated[list[str], typer.Argument(metavar="DATASET...", help="Folders of two or more datasets.")],
    out: Out,
    order: Annotated[str, typer.Option(help="`keep`: one after another; `mix`: each spread over the whole.")] = "keep",
    seed: Seed = 0,
    name: Name = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy shards that could be hard links.")] = False,
    workers: Workers = 1,
    as_json: Json = False,
) -> None:
    """Merge datasets of one row length, packing, weighting and tokenizer, without tokenizing again.

    Example: `lwm-data merge runs/a runs/b --out runs/both`

    `--order keep` carries whole shards, which takes next to no time; `--order mix` copies row by row, and then any
    stretch of rows, so each shard too, has every dataset's share.
    """
    from lwm_data.rearrange import merge as run_merge

    of = run_merge(datasets, out, order=order, seed=seed, name=name, link=not copy, workers=workers)
    _say_derived(of.out, of.info, of.made, as_json)


@rearrange_app.command()
def split(
    dataset: DatasetFolder,
    out: Out,
    parts: Annotated[str, typer.Option(metavar="SHARES", help="Share of the rows of each part.")] = "0.9,0.1",
    names: Annotated[str, typer.Option(metavar="NAMES", help="A name, and folder in DIR, of each.")] = "train,valid",
    by: Annotated[str, typer.Option(help="`row`, or `document`: rows that share a record stay together.")] = "row",
    seed: Seed = 0,
    workers: Workers = 1,
    as_json: Json = False,
) -> None:
    """Split a dataset into parts, each a dataset in a folder of its own.

    Example: `lwm-data split runs/demo/dataset --parts 0.9,0.1 --names train,valid --by document --out runs/parts`
    """
    from lwm_data.rearrange import split as run_split

    try:
        shares = [float(share) for share in parts.split(",")]
    except ValueError:
        raise ValueError(f"--parts: got {parts}; wanted numbers like 0.9,0.1") from None
    made = run_split(dataset, out, shares, names.split(","), by=by, seed=seed, workers=workers)
    if as_json:
        print(json.dumps({"parts": [described(of.out, of.info) | {"made": of.made} for of in made]}))
        return
    rows, tokens = (sum(getattr(of.info, field) for of in made) for field in ("num_rows", "num_tokens"))
    for share, of in zip(shares, made, strict=True):
        print(
            f"{where(of.out)}: {of.info.num_rows:,} rows, {of.info.num_rows / rows:.2%} of all (asked for "
            f"{share:.2%}), and {of.info.num_tokens / tokens:.2%} of the tokens"
            f"{'' if of.made else '; nothing to do, made before'}"
        )


@rearrange_app.command()
def subset(
    dataset: DatasetFolder,
    out: Out,
    rows: Rows = None,
    fraction: Annotated[float | None, typer.Option(help="Share of the rows, drawn by `--seed`.")] = None,
    source: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Rows of this source alone.")] = None,
    seed: Seed = 0,
    name: Name = None,
    workers: Workers = 1,
    as_json: Json = False,
) -> None:
    """Take some rows of a dataset: those that meet every condition given.

    Example: `lwm-data subset runs/demo/dataset --rows 0:1000 --out runs/first`

    With `--source` (give it again for more) only rows that hold nothing else are taken.
    """
    from lwm_data.rearrange import subset as run_subset

    some = _range(rows)
    of = run_subset(
        dataset, out, rows=some, fraction=fraction, sources=source or (), seed=seed, name=name, workers=workers
    )
    _say_derived(of.out, of.info, of.made, as_json)


@rearrange_app.command()
def export(
    dataset: DatasetFolder,
    to: Annotated[str, typer.Option(metavar="FORMAT", help="hf (Parquet), npz, jsonl or jsonl.zst.")],
    out: Out,
    rows: Rows = None,
    as_json: Json = False,
) -> None:
    """Write rows for programs that do not know our shards.

    Example: `lwm-data export runs/demo/dataset --to hf --out runs/demo/hf`

    hf and npz hold the five arrays of each row; jsonl holds examples, with their text.
    """
    from lwm_data.export import export_dataset

    of = export_dataset(dataset, out, to, _range(rows))
    if as_json:
        print(json.dumps({"out": str(of.out), "made": of.made, "rows": of.num_rows, "files": of.files}))
    else:
        said = "exported" if of.made else "nothing to do; exported before"
        num_bytes = sum(of.files.values())
        print(f"{said}: {where(of.out)}: {of.num_rows:,} rows in {len(of.files):,} files, {num_bytes / 1e6:,.1f} MB")


def _range(rows: str | None) -> tuple[int | None, int | None] | None:
    """FROM:TO in numbers; either may be left out."""
    if rows is None:
        return None
    start, colon, stop = rows.partition(":")
    if not colon or not all(end == "" or end.isdecimal() for end in (start, stop)):
        raise ValueError(f"--rows: got {rows}; wanted FROM:TO, like 0:1000, 500: or :500")
    return int(start) if start else None, int(stop) if stop else None


def _say_derived(out: Path, info: DatasetInfo, made: bool, as_json: bool) -> None:
    from lwm_data.summary import dataset_table

    if as_json:
        print(json.dumps(described(out, info) | {"made": made}))
        return
    print_view(dataset_table(info))
    print(f"{'made' if made else 'nothing to do; made before'}: {where(out)}")
