"""lwm-data: datasets of packed rows from the command line. Heavy imports wait inside the verbs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lwm_data.terminal import run_app

if TYPE_CHECKING:
    from lwm_data.format.dataset import DatasetInfo

app = typer.Typer(
    name="lwm-data",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Books and chats to packed training rows.\n\nFor instance: `lwm-data build manifests/demo/dataset.yaml`, then "
    "`lwm-data show runs/demo/dataset 0`.",
)
tokenizer_app = typer.Typer(no_args_is_help=True, help="Make tokenizers.")
app.add_typer(tokenizer_app, name="tokenizer")

Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. row_length=4096.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
DatasetFolder = Annotated[str, typer.Argument(metavar="DATASET", help="Folder of a built dataset.")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder to write: new, empty, or of an earlier run.")]
Seed = Annotated[int, typer.Option(help="Of what is drawn.")]
Name = Annotated[str | None, typer.Option(help="Name of the new dataset.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes to work in.")]
Rows = Annotated[str | None, typer.Option(metavar="FROM:TO", help="Rows FROM up to, but without, TO: 0:1000 or 500:")]


@app.command()
def build(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="A `kind: dataset` YAML file.")],
    overrides: Sets = None,
    workers: Annotated[int, typer.Option(help="Processes to work in.")] = 1,
    as_json: Json = False,
) -> None:
    """Build a dataset, or go on with a build that was stopped.

    Example: `lwm-data build manifests/demo/dataset.yaml --set row_length=1024 --workers 2`

    Stop it with Ctrl-C whenever you like: the next run goes on where it was, and the bytes come out the same.
    A dataset that is already built is left alone. `lwm-data schema dataset` describes the manifest.
    """
    from lwm_data.build import build as run_build
    from lwm_data.summary import dataset_table

    result = run_build(manifest, overrides or (), workers)
    if as_json:
        print(json.dumps(_described(result.out, result.info) | {"built": result.built}))
        return
    _print(dataset_table(result.info))
    print(f"{'built' if result.built else 'nothing to do; built before'}: {_where(result.out)}")


@app.command()
def check(dataset: DatasetFolder, as_json: Json = False) -> None:
    """Check every invariant of a dataset: sizes, hashes, runs, segments, weights, counts.

    Example: `lwm-data check runs/demo/dataset`

    Exit code 2 if anything is wrong; each problem names shard, row and token.
    """
    from lwm_data.check import check_dataset
    from lwm_data.format.dataset import open_dataset
    from lwm_data.terminal import Progress

    opened = open_dataset(dataset)
    with Progress("check", len(opened), "rows") as progress:
        problems = check_dataset(opened, progress.advance)
    if as_json:
        print(json.dumps({"rows": len(opened), "problems": problems}))
    else:
        for problem in problems:
            print(f"lwm-data: error: {problem}", file=sys.stderr)
        if not problems:
            print(f"{dataset}: {len(opened):,} rows, no problem found")
    if problems:
        raise typer.Exit(2)


@app.command()
def show(
    dataset: DatasetFolder,
    row: Annotated[int | None, typer.Argument(metavar="[ROW]", help="Which row; without it, the dataset.")] = None,
    as_json: Json = False,
) -> None:
    """Show a dataset, or one of its rows with its segments; trained text is green, prompts are dim.

    Example: `lwm-data show runs/demo/dataset 0`
    """
    from lwm_data.format.dataset import open_dataset
    from lwm_data.show import row_text, row_view
    from lwm_data.summary import dataset_table

    opened = open_dataset(dataset)
    if row is None:
        if as_json:
            print(opened.info.model_dump_json())
        else:
            _print(dataset_table(opened.info))
        return
    if not 0 <= row < len(opened):
        raise ValueError(f"ROW: got {row}; {dataset} has rows 0 to {len(opened) - 1}")
    view = row_view(opened, row)
    if as_json:
        print(json.dumps(view, ensure_ascii=False))
    else:
        _print(row_text(view))


@app.command()
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


@app.command()
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
        print(json.dumps({"parts": [_described(of.out, of.info) | {"made": of.made} for of in made]}))
        return
    rows, tokens = (sum(getattr(of.info, field) for of in made) for field in ("num_rows", "num_tokens"))
    for share, of in zip(shares, made, strict=True):
        print(
            f"{_where(of.out)}: {of.info.num_rows:,} rows, {of.info.num_rows / rows:.2%} of all (asked for "
            f"{share:.2%}), and {of.info.num_tokens / tokens:.2%} of the tokens"
            f"{'' if of.made else '; nothing to do, made before'}"
        )


@app.command()
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


@app.command()
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
        print(f"{said}: {_where(of.out)}: {of.num_rows:,} rows in {len(of.files):,} files, {num_bytes / 1e6:,.1f} MB")


@app.command()
def schema(kind: Annotated[str, typer.Argument(metavar="KIND", help="dataset or text_tokenizer")] = "dataset") -> None:
    """Print the JSON Schema of a manifest, for editors.

    Example: `lwm-data schema dataset > dataset.schema.json`
    """
    from lwm_data.format.manifest import ManifestModel
    from lwm_data.format.vocab import TextTokenizerSpec
    from lwm_data.manifest import DatasetManifest

    kinds: dict[str, type[ManifestModel]] = {"dataset": DatasetManifest, "text_tokenizer": TextTokenizerSpec}
    if kind not in kinds:
        raise ValueError(f"KIND: got {kind}; wanted {' or '.join(kinds)}")
    print(json.dumps(kinds[kind].model_json_schema(), indent=2))


@tokenizer_app.command("train-text")
def train_text(
    files: Annotated[list[str], typer.Argument(metavar="FILES", help="Globs of text files and chats (.jsonl).")],
    vocab_size: Annotated[int, typer.Option(help="Pieces, 259 or more.")] = 2048,
    out: Annotated[Path, typer.Option(help="The spec to write; the model goes beside it.")] = Path("tokenizer.yaml"),
    needles: Annotated[int, typer.Option(min=0, help="Needle questions to learn from as well.")] = 0,
) -> None:
    """Train a SentencePiece BPE tokenizer that gives back every text exactly.

    Example: `lwm-data tokenizer train-text 'novels/*.txt' --vocab-size 2048 --out tokenizers/mine.yaml`
    """
    from lwm_data.text_training import train_text_tokenizer

    tokenizer = train_text_tokenizer(files, vocab_size, out, needles)
    print(f"{out}: {tokenizer.vocab_size:,} pieces")


def _range(rows: str | None) -> tuple[int | None, int | None] | None:
    """FROM:TO in numbers; either may be left out."""
    if rows is None:
        return None
    start, colon, stop = rows.partition(":")
    if not colon or not all(end == "" or end.isdecimal() for end in (start, stop)):
        raise ValueError(f"--rows: got {rows}; wanted FROM:TO, like 0:1000, 500: or :500")
    return int(start) if start else None, int(stop) if stop else None


def _described(out: Path, info: DatasetInfo) -> dict[str, Any]:
    """A dataset for a script."""
    from lwm_data.summary import fill

    described = {"out": str(out), "fill": fill(info), "fingerprint": info.fingerprint}
    return described | info.model_dump(exclude={"manifest", "shards"})


def _say_derived(out: Path, info: DatasetInfo, made: bool, as_json: bool) -> None:
    from lwm_data.summary import dataset_table

    if as_json:
        print(json.dumps(_described(out, info) | {"made": made}))
        return
    _print(dataset_table(info))
    print(f"{'made' if made else 'nothing to do; made before'}: {_where(out)}")


def _where(path: Path) -> str:
    return min(os.path.relpath(path), os.path.normpath(path), key=len)


def _print(renderable: object) -> None:
    from rich.console import Console

    # A pipe has no width; wide enough then that no number is cut.
    console = Console(soft_wrap=False)
    Console(width=console.width if console.is_terminal else max(console.width, 120)).print(renderable)


def main() -> None:
    """The console script."""
    sys.exit(run_app(app))


if __name__ == "__main__":
    main()
