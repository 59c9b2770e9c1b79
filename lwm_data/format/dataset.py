"""A dataset on disk: a folder of shards with an index that is written last.

    index.json                       format version, row length, shards with rows, sizes and sha256, fingerprints
    shard-000000.tar                 rows (shard.py)
    shard-000000.examples.parquet    which example lies in which row and segment
    text_tokenizer.yaml, .model      the tokenizer of the rows' text
    rejected.jsonl                   records that were not taken, each with its reason
    README.md                        dataset card

A folder without `index.json` is no dataset: a build that was stopped can never be taken for a whole one.
"""

from __future__ import annotations

import bisect
import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import fsspec
import numpy as np
from jaxtyping import Int64, Integer

from lwm_data.format.index import (
    FORMAT_VERSION,
    INDEX,
    DatasetInfo,
    ShardInfo,
    SourceCounts,
    read_index,
    write_index,
)
from lwm_data.format.packed import Arrays, PackedSequence, RunTables, derive, row_of
from lwm_data.format.ranges import LocalRanges, open_ranges
from lwm_data.format.shard import runs_dtype
from lwm_data.format.shard_reader import MappedShard, Shard
from lwm_data.format.vocab import TextTokenizer, load_text_tokenizer

__all__ = [
    "FORMAT_VERSION",
    "INDEX",
    "Dataset",
    "DatasetInfo",
    "ShardInfo",
    "SourceCounts",
    "open_dataset",
    "write_index",
]

OPEN_SHARDS = 64  # file handles and offset tables kept at a time
MAPPED_BYTES = 1 << 16  # longer rows gain nothing from a map: copying them takes far longer than a system call

Numbers = Int64[np.ndarray, " rows"]
RowNumbers = Sequence[int] | Numbers
Tokens = Integer[np.ndarray, "rows length"]


class Dataset:
    """Random access to packed rows; opening costs the index alone, a row costs its own bytes.

    len(d) is the number of rows; d[i] the five arrays of row i (see `Arrays`); d.read(i, start, stop) those of a
    slice of it; d.packed(i) the row with its run table; d.read_batch(rows) the arrays of many rows, much faster.
    """

    def __init__(self, url: str, info: DatasetInfo) -> None:
        self.url, self.info = url, info
        self._first_rows = np.cumsum([0, *(shard.num_rows for shard in info.shards)])
        self._dtype = np.dtype(info.dtype).newbyteorder("<")
        self._open: dict[int, Shard] = {}

    def __len__(self) -> int:
        return self.info.num_rows

    def __reduce__(self) -> tuple[type[Dataset], tuple[str, DatasetInfo]]:
        return Dataset, (self.url, self.info)  # another process opens files of its own

    def __getitem__(self, row: int) -> Arrays:
        return self.read(row, 0, self.info.row_length)

    def read(self, row: int, start: int, stop: int) -> Arrays:
        """The arrays of tokens start..stop of row `row`; only their bytes and the run tables of its page are read."""
        with self._damage():
            packed = self._packed(row, start, stop)
            tables = RunTables.of([(packed.runs, packed.weights)])
            return row_of(derive(packed.tokens[np.newaxis], tables, self.info.row_length, start), 0)

    def packed(self, row: int) -> PackedSequence:
        """Row `row` with its runs and weights."""
        with self._damage():
            return self._packed(row, 0, self.info.row_length)

    def read_tokens(self, rows: RowNumbers, start: int = 0, stop: int | None = None) -> Tokens:
        """Tokens start..stop of some rows, [rows, length] in the dataset's own dtype; whole rows by default."""
        numbers, rows_there, stop = self._find_all(rows, start, stop)
        if shard := self._only_shard(numbers):
            return shard.gather_tokens(rows_there, start, stop)
        return self._read_tokens(numbers, rows_there, start, stop, self._dtype)

    def read_batch(self, rows: RowNumbers, start: int = 0, stop: int | None = None) -> Arrays:
        """The arrays [rows, length] of tokens start..stop of some rows; whole rows by default."""
        numbers, rows_there, stop = self._find_all(rows, start, stop)
        with self._damage():
            if shard := self._only_shard(numbers):
                tokens, tables = shard.gather_tokens(rows_there, start, stop), shard.gather_runs(rows_there)
            else:
                tokens = self._read_tokens(numbers, rows_there, start, stop, np.dtype(np.int32))
                found = zip(numbers.tolist(), rows_there.tolist(), strict=True)
                tables = RunTables.of([self._shard(number).read_runs(row) for number, row in found])
            return derive(tokens, tables, self.info.row_length, start)

    def will_need(self, rows: RowNumbers, start: int = 0, stop: int | None = None) -> None:
        """Have a local disk load what `read_batch` of the same will read; returns at once."""
        numbers, rows_there, stop = self._find_all(rows, start, stop)
        for number, row in zip(numbers.tolist(), rows_there.tolist(), strict=True):
            self._shard(number).will_need(row, start, stop)

    @cached_property
    def text_tokenizer(self) -> TextTokenizer:
        """The tokenizer that lies in the dataset's folder; ValueError where it is not the index's."""
        if "://" in self.url:
            with tempfile.TemporaryDirectory() as folder:
                for name in ("text_tokenizer.yaml", "text_tokenizer.model"):
                    with fsspec.open(f"{self.url}/{name}", "rb") as file:
                        (Path(folder) / name).write_bytes(file.read())
                tokenizer = load_text_tokenizer(Path(folder) / "text_tokenizer.yaml")
        else:
            tokenizer = load_text_tokenizer(Path(self.url) / "text_tokenizer.yaml")
        if tokenizer.fingerprint != self.info.tokenizer_fingerprint:
            raise ValueError(
                f"{self.url}: text_tokenizer.yaml is not the tokenizer this dataset was built with "
                f"(got {tokenizer.fingerprint[:12]}, the index wants {self.info.tokenizer_fingerprint[:12]})"
            )
        return tokenizer

    def _packed(self, row: int, start: int, stop: int) -> PackedSequence:
        self._check(row, row, start, stop)
        number = bisect.bisect_right(self._first_rows, row) - 1
        shard, row_there = self._shard(number), row - int(self._first_rows[number])
        shard.will_need(row_there, start, stop)  # a disk reads tokens and run tables at the same time
        tokens = np.empty(stop - start, self._dtype)
        shard.read_tokens(row_there, start, tokens)
        runs, weights = shard.read_runs(row_there)
        return PackedSequence(tokens, runs.astype(np.uint32), weights)

    def _find_all(self, rows: RowNumbers, start: int, stop: int | None) -> tuple[Numbers, Numbers, int]:
        """The shard of each row, its number in that shard, and `stop`."""
        rows = np.asarray(rows, np.int64)
        if not rows.size:
            raise ValueError(f"{self.url}: no rows asked for; wanted one or more")
        stop = self.info.row_length if stop is None else stop
        self._check(int(rows.min()), int(rows.max()), start, stop)
        numbers = np.searchsorted(self._first_rows, rows, side="right") - 1
        return numbers, rows - self._first_rows[numbers], stop

    def _check(self, lowest: int, highest: int, start: int, stop: int) -> None:
        if lowest < 0 or highest >= len(self):
            row = lowest if lowest < 0 else highest
            raise IndexError(f"{self.url}: row {row}; it has rows 0 to {len(self) - 1}")
        if not 0 <= start < stop <= self.info.row_length:
            raise ValueError(f"{self.url}: tokens {start}..{stop} of a row of {self.info.row_length:,}")

    def _only_shard(self, numbers: Numbers) -> MappedShard | None:
        """The shard that all are, when it is mapped."""
        first = int(numbers[0])
        shard = self._shard(first) if (numbers == first).all() else None
        return shard if isinstance(shard, MappedShard) else None

    def _read_tokens(self, numbers: Numbers, rows: Numbers, start: int, stop: int, dtype: np.dtype) -> Tokens:
        tokens = np.empty((len(rows), stop - start), dtype)
        for number, row, out in zip(numbers.tolist(), rows.tolist(), tokens, strict=True):
            self._shard(number).read_tokens(row, start, out)
        return tokens

    def _shard(self, number: int) -> Shard:
        shard = self._open.pop(number, None)
        if shard is None:
            if len(self._open) >= OPEN_SHARDS:
                del self._open[next(iter(self._open))]
            shard = self._open_shard(self.info.shards[number])
        self._open[number] = shard  # the last one: the first is what was not used for longest
        return shard

    @contextlib.contextmanager
    def _damage(self) -> Iterator[None]:
        """Around reads that find what no writer wrote."""
        try:
            yield
        except (IndexError, OverflowError, ValueError) as error:
            if str(error).startswith(self.url):
                raise
            raise ValueError(f"{self.url}: a damaged shard: {error}; `lwm-data check` tells which") from error

    def _open_shard(self, of: ShardInfo) -> Shard:
        ranges = open_ranges(f"{self.url}/{of.name}")
        if ranges.num_bytes != of.num_bytes:
            raise ValueError(
                f"{self.url}/{of.name}: {ranges.num_bytes:,} bytes, the index says {of.num_bytes:,}: a truncated or "
                "changed shard; build again"
            )
        length = self.info.row_length
        dtypes = (self._dtype, runs_dtype(length, self.info.format_version))
        form = (length, *dtypes, self.info.rows_per_page, of.num_rows, of.offsets_at)
        if isinstance(ranges, LocalRanges) and length * self._dtype.itemsize <= MAPPED_BYTES:
            return MappedShard(ranges, *form)
        return Shard(ranges, *form)


def open_dataset(url: str | Path) -> Dataset:
    """The dataset in the folder `url` (a path or any fsspec URL); ValueError as `read_index` says."""
    url = str(url).rstrip("/")
    return Dataset(url, read_index(url))
