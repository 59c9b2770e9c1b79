"""Builds a dataset: manifest -> units -> token store -> rows -> shards -> index.

    find and hash    input files                                  what is there, and is it what was built before?
    encode           unit -> file of codes                        of pictures and videos: the most expensive, by far
    tokenize         unit -> token store file                     expensive; kept for every row length
    plan             lengths -> examples, rejected.jsonl, rows    cheap; reads no token
    write            rows -> shard, examples table, record        expensive again
    finish           tokenizer, README.md, index.json

Each arrow's output is a function of its input and stands whole or not at all, so a build that was killed goes on
where it was, and its bytes do not depend on that, nor on the number of workers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lwm_data.engine import remove_leftovers, run_units, whole_file
from lwm_data.example_plan import ExamplePlan, plan_examples
from lwm_data.format.dataset import FORMAT_VERSION, DatasetInfo, SourceCounts
from lwm_data.format.shard import rows_per_page
from lwm_data.format.vocab import VISION_VOCAB_SIZE, TextTokenizer, load_text_tokenizer
from lwm_data.manifest import DatasetManifest, read_dataset_manifest
from lwm_data.manifest_sources import AnySource, Needles
from lwm_data.shard_plan import packing_order, plan_shards
from lwm_data.shard_rows import RowFormat, ShardRows, StoreRef, write_shard_rows
from lwm_data.sources.files import InputFile, find_files, hash_file
from lwm_data.sources.unit import Unit, group_input, input_glob, plan_units, read_unit
from lwm_data.summary import dataset_card
from lwm_data.terminal import Progress
from lwm_data.token_store import StoreFile, write_store
from lwm_data.vision.spec import VisionTokenizerSpec, read_vision_tokenizer_spec, save_vision_tokenizer
from lwm_data.vision.spec import vision_tokenizer_fingerprint as vision_fingerprint
from lwm_data.work_folder import ShardRecord, WorkFolder, refuse_foreign

VERSION = 3  # raise it when the same units give other rows
PATHS = ("path", "haystack", "text_tokenizer", "vision_tokenizer")  # keys of the manifest that name files


@dataclass(frozen=True)
class BuildResult:
    """The dataset's index, where it lies, and whether anything had to be done."""

    out: Path
    info: DatasetInfo
    built: bool


def build(manifest_path: str | Path, overrides: Sequence[str] = (), workers: int = 1) -> BuildResult:
    """Build the dataset of the manifest, or finish it, or find that there is nothing to do.

    ValueError for wrong input; whatever is raised, a later build goes on from what is finished.
    """
    if workers < 1:
        raise ValueError(f"--workers: got {workers}; wanted 1 or more")
    manifest = read_dataset_manifest(manifest_path, overrides)
    folder = Path(manifest_path).absolute().parent
    out = Path(manifest.out)
    store = Path(manifest.token_store) if manifest.token_store else out.parent / "token-store"
    refuse_foreign(out)
    tokenizer = load_text_tokenizer(manifest.text_tokenizer)
    vision = read_vision_tokenizer_spec(manifest.vision_tokenizer) if manifest.vision_tokenizer else None
    _check_lengths(manifest)
    units = _plan_units(manifest, tokenizer, vision)
    described = describe(manifest, folder)
    parts = [VERSION, FORMAT_VERSION, described, tokenizer.fingerprint, [unit.fingerprint for unit in units]]
    parts += [vision_fingerprint(vision)] if vision else []
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    with WorkFolder(out) as work:
        info = work.finished(fingerprint)
        if info is not None:
            return BuildResult(out, info, built=False)
        _encode(units, store, manifest.vision_tokenizer, vision, workers)
        _tokenize(units, store, tokenizer, workers)
        sources = [unit.source for unit in units]
        plan = plan_examples(manifest, sources, _paths(units, store), work.planned_rejected)
        work.begin(fingerprint)  # only now: wrong input, found so far, must not cost the dataset that stands there
        stores = (StoreRef(store / unit.file_name, unit.source.name, unit.source.overflow) for unit in units)
        dtype = "uint16" if max(tokenizer.vocab_size, VISION_VOCAB_SIZE) <= 1 << 16 else "uint32"
        form = RowFormat(out, tuple(stores), manifest.row_length, dtype, manifest.packing, manifest.loss_weighting)
        order = packing_order(manifest, plan)
        records = _write_shards(manifest, form, plan, order, work, workers)
        num_sources = len(manifest.sources)
        left_out = np.bincount(plan.sources, minlength=num_sources) - np.bincount(
            plan.sources[order], minlength=num_sources
        )
        info = _info(manifest, described, fingerprint, tokenizer, vision, dtype, plan, left_out.tolist(), records)
        tokenizer.save(out)
        if vision:
            save_vision_tokenizer(vision, out)
        with whole_file(out / "README.md") as file:
            file.write(dataset_card(info).encode())
        work.finish(info)
    return BuildResult(out, info, built=True)


def describe(manifest: DatasetManifest, folder: Path) -> dict[str, Any]:
    """The manifest without what is of this machine: paths relative to the manifest, no output folders."""

    def relative(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: relative(item, name) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [relative(item) for item in value]
        return os.path.relpath(value, folder) if key in PATHS and value and os.path.isabs(value) else value

    described: dict[str, Any] = relative(manifest.model_dump(exclude={"out", "token_store"}))
    return described


def _check_lengths(manifest: DatasetManifest) -> None:
    for i, source in enumerate(manifest.sources):
        if isinstance(source, Needles) and source.tokens.max > manifest.row_length and manifest.packing == "masked":
            raise ValueError(
                f"sources.{i}.tokens.max: got {source.tokens.max:,}; wanted at most the row_length, "
                f"{manifest.row_length:,}"
            )


def _plan_units(manifest: DatasetManifest, tokenizer: TextTokenizer, vision: VisionTokenizerSpec | None) -> list[Unit]:
    groups: list[tuple[AnySource, list[tuple[InputFile, ...]]]] = []
    for i, source in enumerate(manifest.sources):
        pattern, key = input_glob(source)
        groups.append((source, group_input(source, find_files(pattern, f"sources.{i}.{key}"))))
    distinct = {file: file for _, of in groups for files in of for file in files}
    with Progress("read input", len(distinct), "files") as progress:
        num_bytes = 0
        for file, hashed in zip(distinct, run_units(hash_file, None, distinct, 1), strict=True):
            distinct[file] = hashed
            num_bytes += hashed.num_bytes
            progress.advance(1, f"{num_bytes / 1e6:,.1f} MB")
    units = []
    for source, of in groups:
        hashed_groups = [tuple(distinct[file] for file in files) for files in of]
        fingerprint = vision_fingerprint(vision) if vision else None
        units += plan_units(source, hashed_groups, manifest.seed, tokenizer, fingerprint)
    return units


def _encode(
    units: list[Unit], store: Path, vision_tokenizer: str | None, vision: VisionTokenizerSpec | None, workers: int
) -> None:
    coded = {store / unit.codes: unit for unit in units if unit.codes}
    if not coded:
        return
    from lwm_data.encode import encode_unit, encoding  # brings torch, which packing text does not need

    assert vision_tokenizer is not None and vision is not None
    store.mkdir(parents=True, exist_ok=True)
    remove_leftovers(store)
    missing = [unit for path, unit in coded.items() if not path.is_file()]
    with Progress("encode", len(coded), "units") as progress:
        progress.advance(
            len(coded) - len(missing), "the rest is in the token store" if len(missing) < len(coded) else ""
        )
        workers = min(workers, max(1, len(missing)))
        shared = encoding(store, vision_tokenizer, vision_fingerprint(vision), workers)
        num_frames = 0
        for count in run_units(encode_unit, shared, missing, workers):
            num_frames += count
            progress.advance(1, f"{num_frames:,} frames")


def _paths(units: list[Unit], store: Path) -> list[Path]:
    return [store / unit.file_name for unit in units]


@dataclass(frozen=True)
class _Tokenizing:
    store: Path
    tokenizer: TextTokenizer


def _tokenize(units: list[Unit], store: Path, tokenizer: TextTokenizer, workers: int) -> None:
    store.mkdir(parents=True, exist_ok=True)
    remove_leftovers(store)
    missing = {path: unit for path, unit in zip(_paths(units, store), units, strict=True) if not path.is_file()}
    with Progress("tokenize", len(units), "units") as progress:
        progress.advance(
            len(units) - len(missing), "the rest is in the token store" if len(missing) < len(units) else ""
        )
        num_tokens = 0
        # Never more workers than units: each costs an interpreter and its imports.
        workers = min(workers, max(1, len(missing)))
        for count in run_units(_tokenize_unit, _Tokenizing(store, tokenizer), missing.values(), workers):
            num_tokens += count
            progress.advance(1, f"{num_tokens:,} tokens")
    remove_leftovers(store)  # again: the worker of a killed build may have held one a moment ago


def _tokenize_unit(shared: _Tokenizing, unit: Unit) -> int:
    """Write the unit's store file; returns its tokens."""
    path = shared.store / unit.file_name
    write_store(path, read_unit(unit, shared.tokenizer, shared.store))
    return int(StoreFile(path).lengths().sum())


def _write_shards(
    manifest: DatasetManifest, form: RowFormat, plan: ExamplePlan, order: np.ndarray, work: WorkFolder, workers: int
) -> list[ShardRecord]:
    dtype = np.dtype(form.dtype)
    rows_per_shard = max(1, manifest.shard_size // (form.row_length * dtype.itemsize))
    page = rows_per_page(form.row_length, dtype)
    rows_per_shard = rows_per_shard // page * page or rows_per_shard
    done: dict[str, ShardRecord] = {}

    def todo() -> Iterator[ShardRows]:
        for shard in plan_shards(manifest, plan, order, rows_per_shard):
            record = work.record(shard.name)
            if record is None:
                yield shard
            else:
                done[shard.name] = record

    num_tokens = int(plan.lengths[order].sum())
    with Progress("write rows", num_tokens, "tokens") as progress:
        for record in run_units(write_shard_rows, form, todo(), min(workers, -(-num_tokens // manifest.shard_size))):
            done[record.shard.name] = record
            progress.advance(record.num_tokens, f"{len(done)} shards")
    return [done[name] for name in sorted(done, key=lambda name: (len(name), name))]


def _info(
    manifest: DatasetManifest,
    described: dict[str, Any],
    fingerprint: str,
    tokenizer: TextTokenizer,
    vision: VisionTokenizerSpec | None,
    dtype: Any,
    plan: ExamplePlan,
    left_out: list[int],
    records: list[ShardRecord],
) -> DatasetInfo:
    sources = {}
    for (name, (num_records, num_rejected)), unused in zip(plan.records_of.items(), left_out, strict=True):
        counts = [record.sources[name] for record in records if name in record.sources]
        fields = ("examples", "tokens", "vision_tokens", "trained_tokens")
        summed = {field: sum(getattr(of, field) for of in counts) for field in fields}
        sources[name] = SourceCounts(records=num_records, rejected=num_rejected, left_out=unused, **summed)
    return DatasetInfo(
        format_version=FORMAT_VERSION,
        name=manifest.name,
        row_length=manifest.row_length,
        rows_per_page=rows_per_page(manifest.row_length, np.dtype(dtype)),
        dtype=dtype,
        packing=manifest.packing,
        loss_weighting=manifest.loss_weighting,
        num_rows=sum(record.shard.num_rows for record in records),
        num_tokens=sum(record.num_tokens for record in records),
        num_trained=sum(record.num_trained for record in records),
        text_vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vision_tokenizer_fingerprint=vision_fingerprint(vision) if vision else None,
        build_fingerprint=fingerprint,
        sources=sources,
        rejected=plan.reasons,
        manifest=described,
        shards=tuple(record.shard for record in records),
    )
