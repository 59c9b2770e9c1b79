"""A dataset that is made from the rows of others: how it comes to stand in its folder.

described     what is done, and to which datasets       the index's `manifest`; with the inputs' indices it makes
fingerprint   of all that                               the build fingerprint: is it made already?
plan          refuses what cannot be done               before the folder is touched
write         rejected.jsonl, shards                    as a build does it: whole files, records of finished shards
finish        tokenizers, README.md, index.json         the index last
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from lwm_data.engine import run_units
from lwm_data.format.dataset import (
    FORMAT_VERSION,
    INDEX,
    Dataset,
    DatasetInfo,
    ShardInfo,
    SourceCounts,
    open_dataset,
)
from lwm_data.format.shard import rows_per_page
from lwm_data.row_copy import CopiedRows, CopyFormat, carry_file, copy_rows, verify_shard
from lwm_data.summary import dataset_card
from lwm_data.terminal import Progress
from lwm_data.whole_file import whole_file
from lwm_data.work_folder import ShardRecord, WorkFolder, examples_name, refuse_foreign

VERSION = 2  # raise it when the same datasets and options give other bytes

Write = Callable[[WorkFolder, str], DatasetInfo]
"""write(work, fingerprint) calls work.begin, brings the shards to the folder, and returns the index without names."""


@dataclass(frozen=True)
class Derived:
    """The new dataset's index, where it lies, and whether anything had to be done."""

    out: Path
    info: DatasetInfo
    made: bool


def derive_dataset(
    out: Path, inputs: Sequence[Dataset], described: Mapping[str, Any], plan: Callable[[], Write], *, link: bool = False
) -> Derived:
    """The dataset in `out`, made unless it is there. described: what is done to the inputs, with the new `name`."""
    fields = ("name", "num_rows", "fingerprint", "build_fingerprint", "manifest")
    sources = [{field: getattr(dataset.info, field) for field in fields} for dataset in inputs]
    described = {**described, "datasets": sources}
    parts = [VERSION, FORMAT_VERSION, described, [dataset.info.model_dump(mode="json") for dataset in inputs]]
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    _refuse_to_replace(out, inputs, described)
    carried = tokenizer_files(inputs)
    if (out / INDEX).is_file():
        with WorkFolder(out) as work:
            info = work.finished(fingerprint)
            if info is not None and all((out / name).is_file() for name in carried):
                return Derived(out, info, made=False)
    write = plan()
    with WorkFolder(out) as work:
        names = {"name": described["name"], "manifest": described, "build_fingerprint": fingerprint}
        info = DatasetInfo.model_validate(write(work, fingerprint).model_dump() | names)
        for path in out.glob("*_tokenizer.*"):
            if path.name not in carried:  # of the dataset that was here before
                path.unlink()
        for name, source in carried.items():
            carry_file(source, out / name, link=link)
        with whole_file(out / "README.md") as file:
            file.write(dataset_card(info).encode())
        work.finish(info)
    return Derived(out, info, made=True)


def derived_info(
    inputs: Sequence[Dataset],
    shards: Sequence[ShardInfo],
    counted: Sequence[DatasetInfo] | Sequence[ShardRecord],
    sources: Mapping[str, SourceCounts],
    reasons: Mapping[str, int],
    dtype: str,
) -> DatasetInfo:
    """An index like the inputs', of these shards. counted: what to sum tokens over; reasons: of rejected.jsonl."""
    first = inputs[0].info
    changed = {
        "format_version": FORMAT_VERSION,
        "dtype": dtype,
        "rows_per_page": rows_per_page(first.row_length, np.dtype(dtype)),
        "num_rows": sum(shard.num_rows for shard in shards),
        "num_tokens": sum(of.num_tokens for of in counted),
        "num_trained": sum(of.num_trained for of in counted),
        "sources": {name: of.model_dump() for name, of in sources.items()},
        "rejected": dict(sorted(reasons.items())),
        "shards": list(shards),
    }
    # Text alone goes with images of any tokenizer, so the first dataset need not be the one that has codes.
    vision = (dataset.info.vision_tokenizer_fingerprint for dataset in inputs)
    if fingerprint := next((of for of in vision if of is not None), None):
        changed["vision_tokenizer_fingerprint"] = fingerprint
    return DatasetInfo.model_validate(first.model_dump() | changed)


def summed_sources(counts: Iterable[Mapping[str, SourceCounts]]) -> dict[str, SourceCounts]:
    """Counts by source; those of one name are added."""
    sums: dict[str, SourceCounts] = {}
    for sources in counts:
        for name, of in sources.items():
            sums[name] = sums.get(name, SourceCounts()) + of
    return sums


def tokenizer_files(inputs: Sequence[Dataset]) -> dict[str, str]:
    """name -> url of the tokenizers' files that the new dataset carries; ValueError where two have one name but differ.

    Text tokenizers are told apart by their fingerprints, as two specs of one model may differ in words.
    """
    carried: dict[str, str] = {}
    for dataset in inputs:
        assert dataset.text_tokenizer.fingerprint == dataset.info.tokenizer_fingerprint  # or it has raised
        fs, folder = fsspec.core.url_to_fs(dataset.url)
        names = sorted(PurePosixPath(path).name for path in fs.ls(folder, detail=False))
        for name in (name for name in names if "_tokenizer." in name and not name.startswith(".")):
            source = f"{dataset.url}/{name}"
            if name not in carried:
                carried[name] = source
            elif not name.startswith("text_tokenizer.") and _sha256(source) != _sha256(carried[name]):
                raise ValueError(
                    f"{source}: not the file {carried[name]}; only datasets of one tokenizer can be one dataset"
                )
    return carried


def verify_shards(inputs: Sequence[Dataset], touched: Sequence[Sequence[int]], workers: int) -> None:
    """Compare the shards touched[i] of inputs[i] with their hashes; ValueError where one differs."""
    units = [(i, number) for i, numbers in enumerate(touched) for number in numbers]
    if not units:
        return
    read = tuple((dataset.url, dataset.info) for dataset in inputs)
    with Progress("verify shards", len(units), "shards") as progress:
        for _ in run_units(_verify, read, units, min(workers, len(units))):
            progress.advance(1)


def copy_shards(
    work: WorkFolder, form: CopyFormat, units: Iterable[CopiedRows], num_rows: int, workers: int
) -> list[ShardRecord]:
    """Write the shards that are not finished; the records of all, in order."""
    done: dict[str, ShardRecord] = {}

    def todo() -> Iterator[CopiedRows]:
        for unit in units:
            record = work.record(unit.name)
            if record is None:
                yield unit
            else:
                done[unit.name] = record

    missing = todo()
    first = list(itertools.islice(missing, workers))  # never more workers than shards
    with Progress("copy rows", num_rows, "rows") as progress:
        for record in run_units(copy_rows, form, itertools.chain(first, missing), max(1, len(first))):
            done[record.shard.name] = record
            progress.advance(record.shard.num_rows, f"{len(done)} shards")
    return [done[name] for name in sorted(done, key=_number)]


def is_carried(info: DatasetInfo, dtype: str) -> bool:
    """Whether a dataset's shards can be shards of a new one with ids of `dtype` as they are."""
    if info.format_version != FORMAT_VERSION:
        return False
    return info.dtype == dtype and info.rows_per_page == rows_per_page(info.row_length, np.dtype(dtype))


def carry_shards(
    work: WorkFolder, form: CopyFormat, inputs: Sequence[Dataset], link: bool, workers: int
) -> list[ShardInfo]:
    """The inputs' shards in turn, as they are; those that cannot be carried are written anew, row by row."""
    numbered = list(enumerate((i, shard) for i, dataset in enumerate(inputs) for shard in dataset.info.shards))
    shards = {number: replace(shard, name=_name(number)) for number, (_, shard) in numbered}
    carried = [is_carried(dataset.info, form.dtype) for dataset in inputs]
    with Progress("carry shards", len(numbered), "shards") as progress:
        for number, (i, shard) in numbered:
            if carried[i]:
                _carry(work, inputs[i], shard, _name(number), link)
                progress.advance(1)

    def wider() -> Iterator[CopiedRows]:
        first_rows = [0] * len(inputs)
        for number, (i, shard) in numbered:
            rows = np.arange(first_rows[i], first_rows[i] + shard.num_rows)
            first_rows[i] += shard.num_rows
            if not carried[i]:
                yield CopiedRows(_name(number), np.full_like(rows, i), rows)

    if not all(carried):
        num_rows = sum(shard.num_rows for _, (i, shard) in numbered if not carried[i])
        for record in copy_shards(work, form, wider(), num_rows, workers):
            shards[_number(record.shard.name)] = record.shard
    return list(shards.values())


def new_shards(chosen: Iterable[tuple[np.ndarray, np.ndarray]], rows_per_shard: int) -> Iterator[CopiedRows]:
    """Shards of `rows_per_shard` rows, the last one perhaps of fewer, from stretches of (inputs, rows)."""
    number = 0
    held: tuple[np.ndarray, np.ndarray] = (np.zeros(0, np.int64), np.zeros(0, np.int64))
    for inputs, rows in chosen:
        held = np.concatenate([held[0], inputs]), np.concatenate([held[1], rows])
        while len(held[0]) >= rows_per_shard:
            yield CopiedRows(_name(number), held[0][:rows_per_shard], held[1][:rows_per_shard])
            held, number = (held[0][rows_per_shard:], held[1][rows_per_shard:]), number + 1
    if len(held[0]):
        yield CopiedRows(_name(number), *held)


def _name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _number(name: str) -> int:
    return int(name.removeprefix("shard-").removesuffix(".tar"))


def _refuse_to_replace(out: Path, inputs: Sequence[Dataset], described: Mapping[str, Any]) -> None:
    """ValueError where `out` is of a dataset that is read, or holds anything but an earlier run of the same verb."""
    around = [folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists()]
    for dataset in inputs:
        fs, folder = fsspec.core.url_to_fs(dataset.url)
        if isinstance(fs, LocalFileSystem) and any(of.samefile(folder) for of in around):
            raise ValueError(
                f"out: got {out}: it is one of the datasets that are read, or lies in one; name another folder"
            )
    refuse_foreign(out)
    if (out / INDEX).is_file():
        there = open_dataset(out).info
        if any(there.manifest.get(key) != described[key] for key in ("kind", "name")):
            raise ValueError(
                f"out: got {out}: the {there.manifest.get('kind')} {there.name} stands there, which the "
                f"{described['kind']} {described['name']} would replace; name another folder, or remove that one first"
            )


def _carry(work: WorkFolder, dataset: Dataset, shard: ShardInfo, name: str, link: bool) -> None:
    """A carried shard keeps its hash, so that damage, if there is any, is still seen by `check`."""
    target = work.out / name
    if not target.is_file() or target.stat().st_size != shard.num_bytes:  # else a killed merge, of this kind, did it
        carry_file(f"{dataset.url}/{shard.name}", target, link=link)
        if target.stat().st_size != shard.num_bytes:
            raise ValueError(
                f"{dataset.url}/{shard.name}: {target.stat().st_size:,} bytes, the index says {shard.num_bytes:,}: a "
                "truncated or changed shard; build again"
            )
    carry_file(f"{dataset.url}/{examples_name(shard.name)}", work.out / examples_name(name), link=link)


def _verify(read: tuple[tuple[str, DatasetInfo], ...], unit: tuple[int, int]) -> int:
    dataset = Dataset(*read[unit[0]])
    return verify_shard(dataset, dataset.info.shards[unit[1]])


def _sha256(url: str) -> str:
    with fsspec.open(url, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
