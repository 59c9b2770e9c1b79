"""Marks of the texts in the token store: what duplicates and copies of evaluation texts are known by.

    novels-3f0c...arrow  ->  marks-91ab...arrow      one for each store file, beside it; a record of the one, a row of
                                                     the other, in the same order

    content   signature                found  evaluation   ngram
    16 bytes  128 minima of hashes         0  null         null                         a text
    16 bytes  null                         0  null         null                         no words, or vision in it
    16 bytes  128 minima of hashes        41  heldout.txt  "it was on the third of ..."  holds evaluation text
    null      null                         0  null         null                         a rejection

content: blake2b of the text (NFC, white space folded, case kept), with vision, of its codes too. signature: MinHash,
by datasketch, of all 5 words in a row (lower case, no punctuation); two texts agree in as many minima as they share of
their 5-word shingles. found: how many of its n-grams stand in evaluation texts; the first of them, and whose it is.

A marks file is a function of its store file and of what is looked for, and stands whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import UInt32, UInt64

from lwm_data.engine import Workers, run_units
from lwm_data.evaluation_texts import EvaluationTexts, cleanings_of, evaluation_fingerprint, read_evaluation_texts
from lwm_data.folder import Folder
from lwm_data.format.vocab import TextTokenizer
from lwm_data.manifest import DatasetManifest
from lwm_data.manifest_sources import AnySource
from lwm_data.record_text import piece_bytes, text_blocks
from lwm_data.sources.files import InputFile
from lwm_data.sources.record import Record
from lwm_data.terminal import Progress
from lwm_data.token_store import StoreFile
from lwm_data.whole_file import whole_file
from lwm_data.words import WordNumbers, ngram_hashes, split_words

VERSION = 2  # raise it when the same store file gives other marks
SHINGLE = 5  # words
PERMUTATIONS = 128
CHUNK = 1 << 10  # shingles that meet all permutations at a time: half a megabyte, which a cache holds
BATCH = 1 << 14  # records

SCHEMA = pa.schema(
    [
        pa.field("content", pa.binary(16)),
        pa.field("signature", pa.binary(4 * PERMUTATIONS)),
        pa.field("found", pa.uint32(), nullable=False),
        pa.field("evaluation", pa.string()),
        pa.field("ngram", pa.string()),
    ]
)


@dataclass(frozen=True)
class MarkUnit:
    """store: name of a store file; name: of its marks. What is marked, besides content: signatures, evaluation text."""

    store: str
    name: str
    near: bool
    evaluation: bool


def mark_stores(
    manifest: DatasetManifest,
    sources: Sequence[AnySource],
    store: Folder,
    names: Sequence[str],
    tokenizer: TextTokenizer,
    evaluation: Sequence[InputFile],
    workers: Workers,
) -> list[str | None]:
    """Make the marks files that are missing; the name of each store file's, None where its source needs none.

    names: of the files of the token store `store`, each of the source beside it.

    evaluation: the files of `contamination`, hashed. ValueError where one of them cannot be read.
    """
    if manifest.duplicates is None and manifest.contamination is None:
        return [None] * len(names)
    cleanings = cleanings_of(manifest.sources)
    texts = ""
    if manifest.contamination:
        texts = evaluation_fingerprint(manifest.contamination, evaluation, tokenizer, cleanings)
    units = [_unit(manifest, source, name, texts) for source, name in zip(sources, names, strict=True)]
    wanted = {unit.name: unit for unit in units if unit}
    there = store.names()
    missing = [unit for unit in wanted.values() if unit.name not in there]
    with Progress("mark texts", len(wanted), "units") as progress:
        progress.advance(
            len(wanted) - len(missing), "the rest is in the token store" if len(missing) < len(wanted) else ""
        )
        known = None
        if manifest.contamination and any(unit.evaluation for unit in missing):
            known = read_evaluation_texts(manifest.contamination, evaluation, tokenizer, cleanings)
        num_records = 0
        for count in run_units(mark_unit, Marking(store, tokenizer, known), missing, workers, most=len(missing)):
            num_records += count
            progress.advance(1, f"{num_records:,} records")
    store.prepare()  # the worker of a killed build may have left a temporary
    return [unit.name if unit else None for unit in units]


def _unit(manifest: DatasetManifest, source: AnySource, store: str, texts: str) -> MarkUnit | None:
    alike = manifest.duplicates is not None and source.deduplicate
    near = alike and manifest.duplicates is not None and manifest.duplicates.near is not None
    evaluation = bool(texts) and source.decontaminate
    if not alike and not evaluation:
        return None
    made_of = [VERSION, store, near, texts if evaluation else ""]
    return MarkUnit(
        store, f"marks-{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]}.arrow", near, evaluation
    )


@dataclass(frozen=True)
class Marking:
    """What every unit needs. store: the token store; what is derived is made once in each worker."""

    store: Folder
    tokenizer: TextTokenizer
    evaluation: EvaluationTexts | None

    @cached_property
    def table(self) -> list[bytes]:
        return piece_bytes(self.tokenizer)

    @cached_property
    def number_of(self) -> WordNumbers:
        return WordNumbers()

    @cached_property
    def empty_minhash(self) -> Any:
        return new_minhash()


def new_minhash() -> Any:
    """datasketch's MinHash of nothing, for hashes that are made elsewhere. ValueError where it is not installed."""
    try:
        from datasketch import MinHash
    except ImportError as error:
        raise ValueError("duplicates.near needs datasketch; pip install 'lwm[dedup]'") from error
    return MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=int, scheme="affine32")


def mark_unit(shared: Marking, unit: MarkUnit) -> int:
    """Write the unit's marks; returns its records."""
    store = StoreFile(shared.store.fetch(unit.store))
    lengths = store.lengths()
    with (
        shared.store.writing() as folder,
        whole_file(folder / unit.name) as file,
        pa.ipc.new_file(file, SCHEMA) as writer,
    ):
        for first in range(0, len(store), BATCH):
            rows = [
                mark_record(shared, unit, store.record(i)) if lengths[i] else NO_MARKS
                for i in range(first, min(first + BATCH, len(store)))
            ]
            columns = zip(*((row.content, row.signature, row.found, row.evaluation, row.ngram) for row in rows))  # noqa: B905
            arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
    return len(store)


@dataclass(frozen=True)
class Marks:
    """Of one record, as drawn above."""

    content: bytes | None = None
    signature: bytes | None = None
    found: int = 0
    evaluation: str | None = None
    ngram: str | None = None


NO_MARKS = Marks()


def mark_record(shared: Marking, unit: MarkUnit, record: Record) -> Marks:
    """The marks of `record`, in memory that does not grow with its length."""
    content = hashlib.blake2b(digest_size=16)
    codes = hashlib.blake2b(digest_size=16)
    has_vision = False
    for run in record.runs:
        if run.is_vision:
            has_vision = True
            codes.update(run.tokens.tobytes())
    minhash = shared.empty_minhash.copy() if unit.near and not has_vision else None
    ngrams = shared.evaluation.ngrams if unit.evaluation and shared.evaluation else ()
    keep = max([SHINGLE, *(of.size for of in ngrams)]) - 1  # words that the next block's n-grams begin in
    words: list[str] = []
    numbers = np.zeros(0, np.uint64)
    num_words = found = 0
    first: tuple[int, str, str] | None = None  # place, evaluation text, n-gram
    for block in text_blocks(record, shared.table):
        content.update(block.encode())
        if minhash is None and not ngrams:
            continue
        new = split_words(block)
        words = [*words[len(words) - min(keep, len(words)) :], *new]
        numbers = np.concatenate([numbers[len(numbers) - min(keep, len(numbers)) :], shared.number_of(new)])
        num_old = len(words) - len(new)
        start = num_words - num_old  # the place in the text of words[0]
        num_words += len(new)
        if minhash is not None:
            _update(minhash, ngram_hashes(numbers[max(0, num_old - SHINGLE + 1) :], SHINGLE))
        for of in ngrams:
            skipped = max(0, num_old - of.size + 1)
            places, texts = of.find(ngram_hashes(numbers[skipped:], of.size))
            found += len(places)
            if len(places):
                at = skipped + int(places[0])
                assert shared.evaluation is not None
                hit = (start + at, shared.evaluation.names[int(texts[0])], " ".join(words[at : at + of.size]))
                first = min(first, hit) if first else hit
    if minhash is not None and 0 < num_words < SHINGLE:
        _update(minhash, ngram_hashes(numbers, num_words))  # a text of fewer words is one shingle
    if has_vision:
        content.update(b"\0" + codes.digest())
    return Marks(
        content.digest(),
        minhash.hashvalues.astype("<u4").tobytes() if minhash is not None and num_words else None,
        found,
        *(first[1:] if first else (None, None)),
    )


def _update(minhash: Any, hashes: UInt64[np.ndarray, " n"]) -> None:
    short = hashes >> np.uint64(32)
    for start in range(0, len(short), CHUNK):
        minhash.update_batch(short[start : start + CHUNK].tolist())


class MarksFile:
    """One marks file, mapped. ValueError where it cannot be read."""

    def __init__(self, path: Path) -> None:
        try:
            self._map = pa.memory_map(str(path))
            reader = pa.ipc.open_file(self._map)
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path}: damaged marks file ({error}); delete it and build again") from error

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self._batches)

    def contents(self) -> tuple[UInt64[np.ndarray, "n 2"], np.ndarray]:
        """The content hash of each record, and whether it has one."""
        return self._column("content", np.dtype("<u8"), 2)

    def signatures(self) -> tuple[UInt32[np.ndarray, "n 128"], np.ndarray]:
        """The signature of each record, and whether it has one. A view of the map, where the file is one batch."""
        return self._column("signature", np.dtype("<u4"), PERMUTATIONS)

    def found(self) -> Iterator[tuple[int, int, str, str]]:
        """(record, how many, evaluation text, first n-gram) of each record that holds evaluation text."""
        first = 0
        for batch in self._batches:
            counts = batch.column("found").to_numpy()
            for i in np.flatnonzero(counts).tolist():
                text, ngram = (str(batch.column(name)[i].as_py()) for name in ("evaluation", "ngram"))
                yield first + i, int(counts[i]), text, ngram
            first += batch.num_rows

    def _column(self, name: str, dtype: np.dtype[Any], width: int) -> tuple[Any, np.ndarray]:
        values, valid = [np.zeros((0, width), dtype)], [np.zeros(0, np.bool_)]
        for batch in self._batches:
            column = batch.column(name)
            flat = np.frombuffer(column.buffers()[1], dtype, len(column) * width)
            values.append(flat.reshape(-1, width))
            valid.append(np.asarray(column.is_valid()))
        if len(self._batches) == 1:
            return values[1], valid[1]
        return np.concatenate(values), np.concatenate(valid)
