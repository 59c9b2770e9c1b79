"""Reads rows, and slices of rows, of a shard (shard.py draws it).

    Shard          by ranges: one for a row's tokens, one for the run tables of its page; long rows, and remote files
    MappedShard    from the mapped file, one row or many at once: short rows of a local file

A range costs a system call, which takes as long as copying 4,096 tokens. Of a mapped file, what is not in the page
cache is read in blocks of 4 kB one after another, unless `will_need` had it loaded before.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int64, Integer, UInt

from lwm_data.format.packed import RunTables
from lwm_data.format.ranges import LocalRanges, RemoteRanges

BLOCK = 1 << 17  # tokens


class Shard:
    """The rows of one shard.

    runs_dtype: of the runs in the file. page_rows: P of shard.py. at: where the data of `__offsets__` begin; both
    stand in the dataset's index.
    """

    def __init__(
        self,
        ranges: LocalRanges | RemoteRanges,
        row_length: int,
        dtype: np.dtype,
        runs_dtype: np.dtype,
        page_rows: int,
        num_rows: int,
        at: int,
    ) -> None:
        self._runs_dtype = runs_dtype
        self._ranges, self._row_length, self._dtype = ranges, row_length, dtype
        self._page_rows, self._num_rows = page_rows, num_rows
        num_pages = -(-num_rows // page_rows)
        offsets = np.frombuffer(ranges.read(at, at + 32 * num_pages), "<u8")
        if (offsets[1:] <= offsets[:-1]).any() or offsets[-1] >= at:
            raise ValueError(f"__offsets__ at {at:,} do not ascend to it")
        self._offsets = offsets.reshape(-1, 4).tolist()
        self._last = (-1, b"")  # a page, and the bytes of its run tables

    def read_tokens(self, row: int, start: int, out: Integer[np.ndarray, " length"]) -> None:
        """Fill `out`, of any dtype that holds the shard's, with the tokens of `row` from `start` on."""
        at = self._token_at(row, start)
        if out.dtype == self._dtype:
            self._ranges.read_into(at, out.data.cast("B"))
            return
        block = np.empty(min(BLOCK, len(out)), self._dtype)  # small enough to stay in the processor's cache
        for begin in range(0, len(out), BLOCK):
            read = block[: len(out) - begin]
            self._ranges.read_into(at + begin * self._dtype.itemsize, read.data.cast("B"))
            out[begin : begin + BLOCK] = read

    def read_runs(self, row: int) -> tuple[UInt[np.ndarray, "n 3"], Float32[np.ndarray, " n"]]:
        """Runs and weights of the whole row."""
        page, r = divmod(row, self._page_rows)
        begin, end = self._tables_of(page)
        last_page, tables = self._last
        if page != last_page:
            tables = self._ranges.read(begin, end)
            self._last = (page, tables)
        _, runs_at, weights_at, row_starts_at = self._offsets[page]
        first, last = np.frombuffer(tables, "<u4", 2, row_starts_at - begin + 4 * r).tolist()
        self._check_runs(last - first)
        run_at = runs_at - begin + 3 * first * self._runs_dtype.itemsize
        runs = np.frombuffer(tables, self._runs_dtype, 3 * (last - first), run_at).reshape(-1, 3)
        return runs, np.frombuffer(tables, "<f4", last - first, weights_at - begin + 4 * first)

    def will_need(self, row: int, start: int, stop: int) -> None:
        """Have a local disk load the slice and its run tables; returns at once."""
        if isinstance(self._ranges, LocalRanges):
            self._ranges.will_need(self._token_at(row, start), self._token_at(row, stop))
            self._ranges.will_need(*self._tables_of(row // self._page_rows))

    def _check_runs(self, *num_runs: int) -> None:
        """A row has at least one run, and each at least one token; else its page's row_starts are damaged."""
        if min(num_runs) < 1 or max(num_runs) > self._row_length:
            raise ValueError(f"a row of {min(num_runs):,} to {max(num_runs):,} runs")

    def _token_at(self, row: int, token: int) -> int:
        """Where a token of the row begins in the file."""
        page, r = divmod(row, self._page_rows)
        tokens_at: int = self._offsets[page][0]
        return tokens_at + (r * self._row_length + token) * self._dtype.itemsize

    def _tables_of(self, page: int) -> tuple[int, int]:
        """Where runs, weights and row starts of the page begin and end: they lie one after another."""
        _, runs_at, _, row_starts_at = self._offsets[page]
        rows_here = min(self._page_rows, self._num_rows - page * self._page_rows)
        return runs_at, row_starts_at + 4 * (rows_here + 1)


class MappedShard(Shard):
    """The rows of one shard, from the mapped file."""

    def __init__(
        self,
        ranges: LocalRanges,
        row_length: int,
        dtype: np.dtype,
        runs_dtype: np.dtype,
        page_rows: int,
        num_rows: int,
        at: int,
    ) -> None:
        super().__init__(ranges, row_length, dtype, runs_dtype, page_rows, num_rows, at)
        self._pages = np.array(self._offsets, np.int64)
        self._tokens = np.frombuffer(ranges.mapped, dtype, ranges.num_bytes // dtype.itemsize)
        self._words = np.frombuffer(ranges.mapped, "<u4", ranges.num_bytes // 4)
        self._floats = self._words.view("<f4")
        self._runs = np.frombuffer(ranges.mapped, runs_dtype, ranges.num_bytes // runs_dtype.itemsize)

    def read_tokens(self, row: int, start: int, out: Integer[np.ndarray, " length"]) -> None:
        at = self._token_at(row, start) // self._dtype.itemsize
        out[:] = self._tokens[at : at + len(out)]

    def read_runs(self, row: int) -> tuple[UInt[np.ndarray, "n 3"], Float32[np.ndarray, " n"]]:
        page, r = divmod(row, self._page_rows)
        _, runs_at, weights_at, row_starts_at = self._offsets[page]
        at = row_starts_at // 4 + r
        first, last = self._words[at : at + 2].tolist()
        self._check_runs(last - first)
        at = runs_at // self._runs_dtype.itemsize
        runs = self._runs[at + 3 * first : at + 3 * last].reshape(-1, 3)
        return runs, self._floats[weights_at // 4 + first : weights_at // 4 + last]

    def gather_tokens(
        self, rows: Int64[np.ndarray, " rows"], start: int, stop: int
    ) -> Integer[np.ndarray, "rows length"]:
        """Tokens start..stop of some rows, in the shard's dtype, without a turn of a loop for each."""
        page, r = np.divmod(rows, self._page_rows)
        size = self._dtype.itemsize
        shape = (len(self._tokens) - (stop - start) + 1, stop - start)  # a window at every place of the file
        windows: np.ndarray = np.ndarray(shape, self._dtype, self._tokens, strides=(size, size))
        tokens: np.ndarray = windows[self._pages[page, 0] // size + r * self._row_length + start]
        return tokens

    def gather_runs(self, rows: Int64[np.ndarray, " rows"]) -> RunTables:
        """Run tables of some rows, likewise."""
        page, r = np.divmod(rows, self._page_rows)
        _, runs_at, weights_at, row_starts_at = (self._pages[page] // (1, self._runs_dtype.itemsize, 4, 4)).T
        firsts = self._words[row_starts_at + r].astype(np.int64)
        num_runs = self._words[row_starts_at + r + 1] - firsts
        self._check_runs(int(num_runs.min()), int(num_runs.max()))
        runs = self._runs[_stretches(runs_at + 3 * firsts, 3 * num_runs)].reshape(-1, 3)
        return RunTables(runs, self._floats[_stretches(weights_at + firsts, num_runs)], num_runs)


def _stretches(begins: Int64[np.ndarray, " n"], counts: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " sum"]:
    """begins[0], begins[0] + 1, ... counts[0] of them, then as many from begins[1] as counts[1] says, and so on."""
    at: np.ndarray = np.repeat(begins - (np.cumsum(counts) - counts), counts)
    at += np.arange(len(at))
    return at
