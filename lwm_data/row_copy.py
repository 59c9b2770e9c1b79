"""Copies rows of datasets, as packed, to a shard of another: no text is read, nothing is tokenized.

inputs   0  0  1  0        of the shard's rows: which dataset
rows     7  8  0  9        and which row of it
         |  |  |  |
shard    0  1  2  3        the same arrays; the examples table's lines, with `row` counted anew

Whole shards are carried as files: shards do not know of each other, so a shard is as good in another dataset.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Int64

from lwm_data.format.dataset import Dataset, DatasetInfo, ShardInfo, SourceCounts
from lwm_data.format.packed import PackedSequence, merge_runs
from lwm_data.format.shard import ShardWriter
from lwm_data.shard_rows import EXAMPLES_SCHEMA, write_examples
from lwm_data.whole_file import whole_file
from lwm_data.work_folder import ShardRecord, WorkFolder, examples_name

BLOCK = 1 << 20


@dataclass(frozen=True)
class CopyFormat:
    """What all shards of the new dataset have in common. inputs: url and index of each dataset; bos, eos: ids."""

    out: Path
    inputs: tuple[tuple[str, DatasetInfo], ...]
    dtype: str
    bos: int
    eos: int


@dataclass(frozen=True)
class CopiedRows:
    """The rows of one new shard, as drawn above."""

    name: str
    inputs: Int64[np.ndarray, " n"]
    rows: Int64[np.ndarray, " n"]


def copy_rows(form: CopyFormat, shard: CopiedRows) -> ShardRecord:
    """Write the shard and its examples table, then their record. Their bytes are a function of the rows."""
    work = WorkFolder(form.out)
    with work.writing():
        record = _copy(form, shard)
        work.write_record(record)
    return record


def read_examples(dataset: Dataset, shard: ShardInfo) -> pa.Table:
    """The examples table of a shard. ValueError where it is not the index's."""
    name = examples_name(shard.name)
    try:
        with fsspec.open(f"{dataset.url}/{name}", "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise ValueError(f"{dataset.url}/{name}: no such file; build again") from None
    if hashlib.sha256(data).hexdigest() != shard.examples_sha256:
        raise ValueError(f"{dataset.url}/{name}: its sha256 is not the index's: changed; build again")
    return pq.read_table(io.BytesIO(data)).select(EXAMPLES_SCHEMA.names).cast(EXAMPLES_SCHEMA)


def num_split_records(folder: Path, shard: ShardInfo) -> Counter[str]:
    """Per source: the records that were split and whose second part lies in the shard; so each is counted once."""
    table = pq.read_table(folder / examples_name(shard.name), columns=["source", "part"])
    return Counter(table.filter(table["part"].to_numpy() == 1)["source"].to_pylist())


def verify_shard(dataset: Dataset, shard: ShardInfo) -> int:
    """The shard's rows, when its bytes are the index's; ValueError when not: a copy would get a hash of its own, and
    damage could be seen no more."""
    digest = hashlib.sha256()
    with fsspec.open(f"{dataset.url}/{shard.name}", "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    if digest.hexdigest() != shard.sha256:
        raise ValueError(
            f"{dataset.url}/{shard.name}: its sha256 is not the index's: truncated or changed; remove it and build "
            "again (lwm-data check looks at all shards)"
        )
    return shard.num_rows


def carry_file(source: str, target: Path, *, link: bool) -> None:
    """Bring the file `source` (a path or any fsspec URL) to `target`, whole or not at all.

    link: as a second name of the same file where the file system can do that. Files of a dataset are replaced, never
    changed in place, so neither dataset sees what becomes of the other.
    """
    if link and "://" not in source:
        temporary = target.with_name(f".{target.name}.{uuid4().hex}.tmp")
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(os.path.realpath(source), temporary)
            try:
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)  # a rename to another name of the same file leaves both
            return
    with fsspec.open(source, "rb") as read, whole_file(target) as file:
        shutil.copyfileobj(read, file, BLOCK)


def _copy(form: CopyFormat, shard: CopiedRows) -> ShardRecord:
    datasets = {i: Dataset(*form.inputs[i]) for i in np.unique(shard.inputs).tolist()}
    num_tokens = num_trained = 0
    begins = np.ones(len(shard.rows), bool)
    length = form.inputs[0][1].row_length
    with ShardWriter(form.out / shard.name, length, np.dtype(form.dtype)) as writer:
        for at, (i, row) in enumerate(zip(shard.inputs.tolist(), shard.rows.tolist(), strict=True)):
            packed = datasets[i].packed(row)
            lengths, segments, vision = packed.runs.T
            num_tokens += int(lengths[segments > 0].sum())
            num_trained += int(packed.trained_lengths.sum())
            begins[at] = datasets[i].info.packing == "masked" or (
                packed.tokens[0] == form.bos and not vision[0] and not _goes_on(datasets[i], row, form.eos)
            )
            runs = merge_runs(packed.runs, packed.weights)  # version 1 had more of them
            writer.add(PackedSequence(packed.tokens, *runs))
    table = _examples(datasets, shard)
    return write_examples(writer, table, num_tokens, num_trained, _counts(table, begins))


def _goes_on(dataset: Dataset, row: int, eos: int) -> bool:
    """Whether a naive row that begins with BOS begins inside the example that the row before it ends in.

    Each example begins with BOS and ends with EOS, but a field spec may put BOS inside, too.
    """
    if row == 0:
        return False
    before = dataset.packed(row - 1)
    _, segment, is_vision = before.runs[-1]
    if segment == 0 or (before.tokens[-1] == eos and not is_vision):
        return False
    return _example_of(dataset, row - 1, -1) == _example_of(dataset, row, 0)


def _example_of(dataset: Dataset, row: int, which: int) -> dict[str, object]:
    """Source, key and part of the first (0) or last (-1) example of a row."""
    ends = np.cumsum([shard.num_rows for shard in dataset.info.shards])
    number = int(np.searchsorted(ends, row, side="right"))
    table = read_examples(dataset, dataset.info.shards[number])
    lines = np.flatnonzero(table["row"].to_numpy() == row - ends[number] + dataset.info.shards[number].num_rows)
    example: dict[str, object] = table.select(["source", "key", "part"]).slice(lines[which], 1).to_pylist()[0]
    return example


def _examples(datasets: dict[int, Dataset], shard: CopiedRows) -> pa.Table:
    """The lines of the rows' examples, in the order of the rows."""
    taken: list[pa.Table] = []
    for i, dataset in datasets.items():
        ends = np.cumsum([of.num_rows for of in dataset.info.shards])
        places = np.flatnonzero(shard.inputs == i)
        numbers = np.searchsorted(ends, shard.rows[places], side="right")
        for number in np.unique(numbers).tolist():
            of = dataset.info.shards[number]
            table = read_examples(dataset, of)
            here = places[numbers == number]
            rows = shard.rows[here] - (int(ends[number]) - of.num_rows)
            starts = np.searchsorted(table["row"].to_numpy(), np.arange(of.num_rows + 1))
            counts = starts[rows + 1] - starts[rows]
            firsts = np.repeat(starts[rows] - (np.cumsum(counts) - counts), counts)
            lines = table.take(firsts + np.arange(len(firsts)))
            row = pa.array(np.repeat(here, counts), pa.int64())
            taken.append(lines.set_column(0, EXAMPLES_SCHEMA.field("row"), row))
    table = pa.concat_tables(taken)
    order = np.argsort(table["row"].to_numpy(), kind="stable")
    return table.take(order).combine_chunks()


def _counts(table: pa.Table, begins: Bool[np.ndarray, " rows"]) -> dict[str, SourceCounts]:
    """Per source: examples that begin here, records whose first part is one of these, and tokens."""
    row = table["row"].to_numpy()
    is_first = np.diff(row, prepend=-1) != 0
    begun = ~is_first | begins[row]
    source = table["source"].combine_chunks().dictionary_encode()
    number = source.indices.to_numpy()
    columns = {
        "records": begun & (table["part"].to_numpy() == 0),
        "examples": begun,
        "tokens": table["num_tokens"].to_numpy(),
        "vision_tokens": table["num_vision"].to_numpy(),
        "trained_tokens": table["num_trained"].to_numpy(),
    }
    return {
        name: SourceCounts.model_validate({field: int(column[number == i].sum()) for field, column in columns.items()})
        for i, name in enumerate(source.dictionary.to_pylist())
    }
