"""Builds a dataset: manifest -> units -> token store -> rows -> shards -> index.

    find and hash    input files                                  what is there, and is it what was built before?
    encode           unit -> file of codes                        of pictures and videos: the most expensive, by far
    tokenize         unit -> token store file                     expensive; kept for every row length
    mark             token store file -> marks                    where duplicates or evaluation texts are left out
    plan             lengths -> examples, rejected.jsonl, rows    cheap; reads no token
    write            rows -> shard, examples table, record        expensive again
    finish           tokenizer, README.md, index.json

Each arrow's output is a function of its input and stands whole or not at all, so a build that was killed goes on
where it was, and its bytes do not depend on that, nor on the number of workers.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lwm_data.engine import Workers, model_cores, run_units
from lwm_data.evaluation_texts import find_evaluation_files
from lwm_data.example_plan import ExamplePlan, plan_examples
from lwm_data.folder import DiskFolder, Folder, folder_beside, open_folder
from lwm_data.format.dataset import FORMAT_VERSION, DatasetInfo, SourceCounts
from lwm_data.format.shard import rows_per_page
from lwm_data.format.vocab import VISION_VOCAB_SIZE, TextTokenizer, load_text_tokenizer
from lwm_data.manifest import DatasetManifest, read_dataset_manifest
from lwm_data.manifest_sources import AnySource, Needles, Qa
from lwm_data.shard_plan import packing_order, plan_shards
from lwm_data.shard_rows import RowFormat, ShardRows, StoreRef, write_shard_rows
from lwm_data.sources.files import InputFile, find_files, hash_file
from lwm_data.sources.unit import Unit, group_input, input_glob, plan_units, read_unit
from lwm_data.summary import dataset_card
from lwm_data.terminal import Progress
from lwm_data.text_marks import VERSION as MARKS_VERSION
from lwm_data.text_marks import mark_stores
from lwm_data.token_store import StoreFile, write_store
from lwm_data.unit_range import UnitRange
from lwm_data.vision.spec import VisionTokenizerSpec, read_vision_tokenizer_spec, save_vision_tokenizer
from lwm_data.vision.spec import vision_tokenizer_fingerprint as vision_fingerprint
from lwm_data.whole_file import whole_file
from lwm_data.work_folder import ShardRecord, WorkFolder, refuse_foreign

VERSION = 3  # raise it when the same units give other rows
GLOBS = ("path", "haystack", "books", "texts")  # keys of the manifest that name files by a pattern
FILES_PER_WORKER = 256  # input files that are worth a process to hash them
PATHS = (*GLOBS, "text_tokenizer", "vision_tokenizer")  # keys of the manifest that name files


@dataclass(frozen=True)
class BuildResult:
    """The dataset's index, where it lies, and whether anything had to be done."""

    folder: Folder
    info: DatasetInfo
    built: bool

    @property
    def out(self) -> Path:
        """The folder's path, where it is on a disk."""
        assert isinstance(self.folder, DiskFolder), f"{self.folder} is not on a disk"
        return self.folder.path


@dataclass(frozen=True)
class ShareResult:
    """What is done of a share of the units: num_units of all num_planned, in the token store."""

    store: Folder
    num_units: int
    num_planned: int


def build(manifest_path: str | Path, overrides: Sequence[str] = (), workers: Workers = 1) -> BuildResult:
    """Build the dataset of the manifest, or finish it, or find that there is nothing to do.

    ValueError for wrong input; whatever is raised, a later build goes on from what is finished.
    """
    if isinstance(workers, int) and workers < 1:
        raise ValueError(f"--workers: got {workers}; wanted 1 or more")
    manifest = read_dataset_manifest(manifest_path, overrides)
    folder = Path(manifest_path).absolute().parent
    out, store = open_folder(manifest.out), _store(manifest)
    out.check()
    store.check()
    refuse_foreign(out)
    tokenizer = load_text_tokenizer(manifest.text_tokenizer)
    vision = read_vision_tokenizer_spec(manifest.vision_tokenizer) if manifest.vision_tokenizer else None
    _check_lengths(manifest)
    units, _ = _plan_units(manifest, tokenizer, vision, workers)
    described = describe(manifest, folder)
    parts = [VERSION, FORMAT_VERSION, described, tokenizer.fingerprint, [unit.fingerprint for unit in units]]
    parts += [vision_fingerprint(vision)] if vision else []
    evaluation = find_evaluation_files(manifest.contamination) if manifest.contamination else []
    if manifest.duplicates or manifest.contamination:
        parts += [MARKS_VERSION, [file.sha256 for file in evaluation]]
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    with WorkFolder(out) as work:
        info = work.finished(fingerprint)
        if info is not None:
            return BuildResult(out, info, built=False)
        _encode(units, store, manifest.vision_tokenizer, vision, workers)
        _tokenize(units, store, tokenizer, workers)
        sources = [unit.source for unit in units]
        names = [unit.file_name for unit in units]
        marks = mark_stores(manifest, sources, store, names, tokenizer, evaluation, workers)
        plan = plan_examples(manifest, sources, store, names, marks, work)
        work.begin(fingerprint)  # only now: wrong input, found so far, must not cost the dataset that stands there
        stores = tuple(StoreRef(unit.file_name, unit.source.name, unit.source.overflow) for unit in units)
        dtype = "uint16" if max(tokenizer.vocab_size, VISION_VOCAB_SIZE) <= 1 << 16 else "uint32"
        form = RowFormat(
            out, store, stores, manifest.row_length, dtype, manifest.packing, manifest.loss_weighting, work.lock
        )
        order = packing_order(manifest, plan)
        records = _write_shards(manifest, form, plan, order, work, workers)
        num_sources = len(manifest.sources)
        left_out = np.bincount(plan.sources, minlength=num_sources) - np.bincount(
            plan.sources[order], minlength=num_sources
        )
        info = _info(manifest, described, fingerprint, tokenizer, vision, dtype, plan, left_out.tolist(), records)
        with work.adding() as written:
            tokenizer.save(written)
            if vision:
                save_vision_tokenizer(vision, written)
            with whole_file(written / "README.md") as file:
                file.write(dataset_card(info).encode())
        work.finish(info)
    return BuildResult(out, info, built=True)


def build_share(
    manifest_path: str | Path, unit_range: UnitRange, overrides: Sequence[str] = (), workers: Workers = 1
) -> ShareResult:
    """Encode and tokenize the units of one share, and nothing else; a build then finds them in the token store.

    Only the share's input is read. Others may work on other shares, or on all, at the same time.
    """
    manifest = read_dataset_manifest(manifest_path, overrides)
    store = _store(manifest)
    store.check()
    tokenizer = load_text_tokenizer(manifest.text_tokenizer)
    vision = read_vision_tokenizer_spec(manifest.vision_tokenizer) if manifest.vision_tokenizer else None
    _check_lengths(manifest)
    units, num_planned = _plan_units(manifest, tokenizer, vision, workers, unit_range)
    _encode(units, store, manifest.vision_tokenizer, vision, workers)
    _tokenize(units, store, tokenizer, workers)
    return ShareResult(store, len(units), num_planned)


def _store(manifest: DatasetManifest) -> Folder:
    if manifest.token_store:
        return open_folder(manifest.token_store)
    return folder_beside(open_folder(manifest.out), "token-store")


def describe(manifest: DatasetManifest, folder: Path) -> dict[str, Any]:
    """The manifest without what is of this machine: paths relative to the manifest, no output folders."""

    def relative(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: relative(item, name) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [relative(item, key) for item in value]
        if key not in PATHS or not value or not os.path.isabs(value):
            return value
        return os.path.relpath(value, glob.escape(str(folder)) if key in GLOBS else folder)

    described: dict[str, Any] = relative(manifest.model_dump(exclude={"out", "token_store"}))
    return described


def _check_lengths(manifest: DatasetManifest) -> None:
    for i, source in enumerate(manifest.sources):
        if not isinstance(source, Needles | Qa) or manifest.packing == "naive":
            continue
        if source.tokens.max > manifest.row_length:
            raise ValueError(
                f"sources.{i}.tokens.max: got {source.tokens.max:,}; wanted at most the row_length, "
                f"{manifest.row_length:,}"
            )


def _plan_units(
    manifest: DatasetManifest,
    tokenizer: TextTokenizer,
    vision: VisionTokenizerSpec | None,
    workers: Workers,
    unit_range: UnitRange | None = None,
) -> tuple[list[Unit], int]:
    """The units, or those of the range, and how many there are in all."""
    groups: list[tuple[AnySource, list[tuple[InputFile, ...]]]] = []
    for i, source in enumerate(manifest.sources):
        pattern, key = input_glob(source)
        groups.append((source, group_input(source, find_files(pattern, f"sources.{i}.{key}"))))
    fingerprint = vision_fingerprint(vision) if vision else None

    def plan(hashed: dict[InputFile, InputFile]) -> list[Unit]:
        units = []
        for source, of in groups:
            files = [tuple(hashed.get(file, file) for file in group) for group in of]
            units += plan_units(source, files, manifest.seed, tokenizer, fingerprint)
        return units

    # Which units there are does not depend on the hashes, only how they are called: a share reads its own input alone.
    unhashed = plan({})
    chosen = unit_range.of(len(unhashed)) if unit_range else range(len(unhashed))
    distinct = list(dict.fromkeys(file for i in chosen for file in unhashed[i].files))
    with Progress("read input", len(distinct), "files") as progress:
        hashed = {}
        num_bytes = 0
        most = len(distinct) // FILES_PER_WORKER
        for file, known in zip(distinct, run_units(hash_file, None, distinct, workers, most), strict=True):
            hashed[file] = known
            num_bytes += known.num_bytes
            progress.advance(1, f"{num_bytes / 1e6:,.1f} MB")
    units = plan(hashed)
    assert len(units) == len(unhashed)
    return [units[i] for i in chosen], len(units)


def _encode(
    units: list[Unit], store: Folder, vision_tokenizer: str | None, vision: VisionTokenizerSpec | None, workers: Workers
) -> None:
    coded = {unit.codes: unit for unit in units if unit.codes}
    if not coded:
        return
    from lwm_data.encode import Encoding, encode_unit  # brings torch, which packing text does not need

    assert vision_tokenizer is not None and vision is not None
    store.prepare()
    there = store.sizes()
    missing = [unit for name, unit in coded.items() if name not in there]
    with Progress("encode", len(coded), "units") as progress:
        progress.advance(
            len(coded) - len(missing), "the rest is in the token store" if len(missing) < len(coded) else ""
        )
        if not missing:
            return
        cores = model_cores(workers, len(missing))
        shared = Encoding(store, vision_tokenizer, vision_fingerprint(vision), cores)
        num_frames = 0
        for count in run_units(encode_unit, shared, missing, workers, len(missing), model=True):
            num_frames += count
            progress.advance(1, f"{num_frames:,} frames")
    store.prepare()  # again: of workers that were killed


@dataclass(frozen=True)
class _Tokenizing:
    store: Folder
    tokenizer: TextTokenizer


def _tokenize(units: list[Unit], store: Folder, tokenizer: TextTokenizer, workers: Workers) -> None:
    store.prepare()
    there = store.sizes()
    missing = {unit.file_name: unit for unit in units if unit.file_name not in there}
    with Progress("tokenize", len(units), "units") as progress:
        progress.advance(
            len(units) - len(missing), "the rest is in the token store" if len(missing) < len(units) else ""
        )
        num_tokens = 0
        shared = _Tokenizing(store, tokenizer)
        for count, num_rejected in run_units(_tokenize_unit, shared, missing.values(), workers, len(missing)):
            num_tokens += count
            progress.advance(1, f"{num_tokens:,} tokens", num_rejected)
    store.prepare()  # again: the worker of a killed build may have held one a moment ago


def _tokenize_unit(shared: _Tokenizing, unit: Unit) -> tuple[int, int]:
    """Write the unit's store file; returns its tokens and how many records it rejects."""
    with shared.store.writing() as folder:
        write_store(folder / unit.file_name, read_unit(unit, shared.tokenizer, shared.store))
        written = StoreFile(folder / unit.file_name)
        return int(written.lengths().sum()), len(written.rejections())


def _write_shards(
    manifest: DatasetManifest, form: RowFormat, plan: ExamplePlan, order: np.ndarray, work: WorkFolder, workers: Workers
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
        for record in run_units(write_shard_rows, form, todo(), workers, -(-num_tokens // manifest.shard_size)):
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
    for (name, of_records), unused in zip(plan.counts_of.items(), left_out, strict=True):
        counts = [record.sources[name] for record in records if name in record.sources]
        fields = ("examples", "tokens", "vision_tokens", "trained_tokens")
        summed = {field: sum(getattr(of, field) for of in counts) for field in fields}
        sources[name] = of_records.model_copy(update={"left_out": unused, **summed})
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
        rejected=sum(plan.counts_of.values(), SourceCounts()).reasons,
        manifest=described,
        shards=tuple(record.shard for record in records),
    )
