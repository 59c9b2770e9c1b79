"""lwm-data: datasets of packed rows from the command line. Heavy imports wait inside the verbs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from lwm_data.cli_output import described, print_view, view_console, where
from lwm_data.qa_cli import qa
from lwm_data.rearrange_cli import rearrange_app
from lwm_data.report_cli import report
from lwm_data.terminal import run_app
from lwm_data.vision_cli import add_vision_verbs, vision_app

app = typer.Typer(
    name="lwm-data",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Books, pictures, videos and chats to packed training rows.\n\nFor instance: `lwm-data build "
    "manifests/demo/dataset.yaml`, then `lwm-data show runs/demo/dataset 0`.",
)
tokenizer_app = typer.Typer(no_args_is_help=True, help="Make tokenizers.")
app.add_typer(rearrange_app)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(vision_app, name="vision")
add_vision_verbs(tokenizer_app)
app.command()(qa)
app.command()(report)

Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. row_length=4096.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
DatasetFolder = Annotated[str, typer.Argument(metavar="DATASET", help="Folder of a built dataset.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes to work in.")]


@app.command()
def build(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="A `kind: dataset` YAML file.")],
    overrides: Sets = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes to work in, 1 by default; with --ray units at a time, all by default.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Work on this Ray cluster: auto, local or host:port.")
    ] = None,
    unit_range: Annotated[
        str | None, typer.Option(metavar="K/N", help="Encode and tokenize only this share of the input, such as 3/16.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Build a dataset, or go on with a build that was stopped.

    Example: `lwm-data build manifests/demo/dataset.yaml --set row_length=1024 --workers 2`

    Stop it with Ctrl-C whenever you like: the next run goes on where it was, and the bytes come out the same.
    A dataset that is already built is left alone. `lwm-data schema dataset` describes the manifest.

    With `--json` progress is JSON lines on stderr, and the result on stdout.
    """
    from lwm_data.build import build as run_build
    from lwm_data.build import build_share
    from lwm_data.ray_pool import connect_ray
    from lwm_data.summary import dataset_table
    from lwm_data.terminal import progress_as_json
    from lwm_data.unit_range import parse_unit_range

    if workers is not None and workers < 1:
        raise ValueError(f"--workers: got {workers}; wanted 1 or more")
    share = parse_unit_range(unit_range) if unit_range else None
    where_to_work = connect_ray(ray, workers) if ray else workers or 1
    with progress_as_json(as_json):
        if share is not None:
            done = build_share(manifest, share, overrides or (), where_to_work)
            if as_json:
                counts = {"units": done.num_units, "planned_units": done.num_planned}
                print(json.dumps({"unit_range": unit_range, "token_store": str(done.store)} | counts))
                return
            print(
                f"{done.num_units:,} of {done.num_planned:,} units are in {where(done.store)}; when all shares are, "
                "build without --unit-range"
            )
            return
        result = run_build(manifest, overrides or (), where_to_work)
    if as_json:
        print(json.dumps(described(result.folder, result.info) | {"built": result.built}))
        return
    print_view(dataset_table(result.info))
    print(f"{'built' if result.built else 'nothing to do; built before'}: {where(result.folder)}")


@app.command()
def check(dataset: DatasetFolder, workers: Workers = 1, as_json: Json = False) -> None:
    """Check every invariant of a dataset: sizes, hashes, runs, segments, weights, counts.

    Example: `lwm-data check runs/demo/dataset --workers 2`

    Exit code 2 if anything is wrong; each problem names shard, row and token.
    """
    from lwm_data.check import check_dataset
    from lwm_data.format.dataset import open_dataset
    from lwm_data.terminal import Progress

    opened = open_dataset(dataset)
    with Progress("check", len(opened), "rows") as progress:
        problems = check_dataset(opened, progress.advance, workers)
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
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FOLDER", help="Write the row's pictures and videos there.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a dataset, or one of its rows with its segments; trained text is green, prompts are dim.

    Example: `lwm-data show runs/demo/dataset 0`

    A terminal of colours shows pictures, and of a video as many frames as fit. `--png` writes a file for each,
    like row000005-segment01.png, a video as a strip of frames.
    """
    from lwm_data.format.dataset import open_dataset
    from lwm_data.show import print_row, row_view, write_pngs
    from lwm_data.summary import dataset_table

    opened = open_dataset(dataset)
    if row is None:
        if png is not None:
            raise ValueError("--png: wanted a ROW before it, whose pictures are written")
        if as_json:
            print(opened.info.model_dump_json())
        else:
            print_view(dataset_table(opened.info))
        return
    if not 0 <= row < len(opened):
        raise ValueError(f"ROW: got {row}; {dataset} has rows 0 to {len(opened) - 1}")
    written = write_pngs(opened, row, png) if png is not None else []
    if as_json:
        view = row_view(opened, row) | ({"png": [str(path) for path in written]} if png is not None else {})
        print(json.dumps(view, ensure_ascii=False))
        return
    print_row(opened, row, view_console())
    if png is not None:
        said = f"{len(written):,} picture{'s' if len(written) != 1 else ''} written to {png}"
        print(said if written else f"row {row} has no picture or video: nothing is written to {png}")


@app.command()
def schema(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help="dataset, qa, qa_prompt, text_tokenizer or vision_tokenizer")
    ] = "dataset",
) -> None:
    """Print the JSON Schema of a manifest, for editors.

    Example: `lwm-data schema dataset > dataset.schema.json`
    """
    from lwm_data.format.manifest import ManifestModel
    from lwm_data.format.vocab import TextTokenizerSpec
    from lwm_data.manifest import DatasetManifest
    from lwm_data.manifest_qa import QaManifest, QaPrompt
    from lwm_data.vision.spec import VisionTokenizerSpec

    kinds: dict[str, type[ManifestModel]] = {
        "dataset": DatasetManifest,
        "qa": QaManifest,
        "qa_prompt": QaPrompt,
        "text_tokenizer": TextTokenizerSpec,
        "vision_tokenizer": VisionTokenizerSpec,
    }
    if kind not in kinds:
        raise ValueError(f"KIND: got {kind}; wanted {', '.join(kinds)}")
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


def main() -> None:
    """The console script."""
    sys.exit(run_app(app))


if __name__ == "__main__":
    main()
