"""Which row of a dataset goes to which part, and nothing else; rejected records follow the rows.

row         0   1   2   3   4   5
documents   a   ab  b   c   d   d      rows that share a document are one group
part        0   0   0   1   0   0      by document, shares 0.8 and 0.2: groups 0-2, 3, 4-5; -1 is in no part

A choice is an int8 array, so that it costs a byte per row. All of it is a function of the seed and of the numbers of
the rows, never of the machine or of the order of work.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import fsspec
import numpy as np
from jaxtyping import Bool, Float64, Int8, Int64, UInt64

from lwm_data.example_plan import NOT_WHOLE
from lwm_data.format.dataset import Dataset, DatasetInfo
from lwm_data.mix import hashed
from lwm_data.row_copy import read_examples
from lwm_data.terminal import Progress

CHUNK = 1 << 18  # rows that are drawn at a time
NOWHERE = -1

Parts = Int8[np.ndarray, " rows"]


def drawn(seed: str, start: int, stop: int) -> Float64[np.ndarray, " n"]:
    """A number in [0, 1) for each of start..stop, of the 53 bits that a float64 holds: with all 64, some round to 1."""
    return (hashed(seed, start, stop) >> np.uint64(11)) / 2.0**53


def mixed_rows(num_rows: Sequence[int], seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(inputs, rows) of all rows of several datasets, in stretches: each dataset spread evenly over the whole.

    Row k of n stands at a place drawn from k / n to (k + 1) / n. So wherever the whole is cut, a piece has each
    dataset's share of rows, give or take one or two, and each dataset's rows stay in order.
    """

    def places(i: int, n: int) -> Iterator[tuple[float, int, int]]:
        for start in range(0, n, CHUNK):
            stop = min(start + CHUNK, n)
            place = (np.arange(start, stop) + drawn(f"{seed}|{i}", start, stop)) / n
            yield from zip(place.tolist(), itertools.repeat(i), range(start, stop), strict=False)

    merged = heapq.merge(*(places(i, n) for i, n in enumerate(num_rows)))
    while stretch := list(itertools.islice(merged, CHUNK)):
        numbers = np.array([(i, row) for _, i, row in stretch], np.int64)
        yield numbers[:, 0], numbers[:, 1]


def rows_of_part(parts: Parts, part: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(inputs, rows) of the rows of one part, in stretches; there is one input, 0."""
    for start in range(0, len(parts), CHUNK):
        rows = start + np.flatnonzero(parts[start : start + CHUNK] == part)
        yield np.zeros_like(rows), rows


def shards_of_rows(info: DatasetInfo, taken: Bool[np.ndarray, " rows"]) -> list[int]:
    """The shards that hold one of the rows `taken`."""
    firsts = np.cumsum([0, *(shard.num_rows for shard in info.shards[:-1])])
    found: list[int] = np.flatnonzero(np.logical_or.reduceat(taken, firsts)).tolist()
    return found


def parts_by_row(num_rows: int, shares: Sequence[float], seed: int) -> Parts:
    """Each row to a part by a draw of its own; what is left of 1 by `shares` goes nowhere."""
    parts = np.full(num_rows, NOWHERE, np.int8)
    ends = np.cumsum(shares)
    if abs(ends[-1] - 1) < 1e-9:
        ends[-1] = 1  # 0.7 + 0.2 + 0.1 is a little less
    for start in range(0, num_rows, CHUNK):
        stop = min(start + CHUNK, num_rows)
        part = np.searchsorted(ends, drawn(str(seed), start, stop), side="right")
        parts[start:stop] = np.where(part < len(shares), part, NOWHERE)
    return parts


def parts_by_document(dataset: Dataset, shares: Sequence[float], seed: int) -> tuple[Parts, int, int]:
    """Groups of rows to parts, so that no record lies in two; then the number of groups, and the largest one's rows.

    Large groups first, each to the part that is then the least over its share (the highest averages of a parliament):
    so large documents, too, are shared out, as near to the shares as they allow. Memory: about 24 bytes per example.
    """
    pairs = [np.zeros((0, 2), np.uint64)]
    for lines in example_lines(dataset, range(len(dataset.info.shards))):
        pairs.append(np.unique(np.stack([lines.records, lines.rows.astype(np.uint64)], axis=1), axis=0))
    by_record = np.concatenate(pairs)  # shards are in order, so that a stable sort leaves the rows of a record in turn
    by_record = by_record[np.argsort(by_record[:, 0], kind="stable")]
    neighbours = by_record[1:, 0] == by_record[:-1, 0]
    rows = by_record[:, 1].astype(np.int64)
    group_of = _first_of_group(dataset.info.num_rows, rows[:-1][neighbours], rows[1:][neighbours])
    firsts, number, sizes = np.unique(group_of, return_inverse=True, return_counts=True)
    draws = drawn(str(seed), 0, len(firsts))
    assigned = [0] * len(shares)
    part_of = np.zeros(len(firsts), np.int8)
    for group in np.lexsort((draws, -sizes)).tolist():
        size = int(sizes[group])
        part = min(range(len(shares)), key=lambda p: (assigned[p] + size) / shares[p])
        assigned[part] += size
        part_of[group] = part
    return part_of[number], len(firsts), int(sizes.max())


def leave_out_other_sources(dataset: Dataset, parts: Parts, sources: Collection[str]) -> None:
    """Put rows that hold examples of other sources than `sources` in no part; shards without a part are not read."""
    for lines in example_lines(dataset, shards_of_rows(dataset.info, parts != NOWHERE)):
        other = np.array([source not in sources for source in lines.names], bool)[lines.sources]
        parts[lines.rows[other]] = NOWHERE


@dataclass(frozen=True)
class ExampleLines:
    """The examples of one shard. rows: of the dataset. records: a hash of source and key. sources: index in names."""

    rows: Int64[np.ndarray, " n"]
    records: UInt64[np.ndarray, " n"]
    sources: Int64[np.ndarray, " n"]
    names: list[str]


def example_lines(dataset: Dataset, shards: Sequence[int]) -> Iterator[ExampleLines]:
    """The examples tables of some shards in turn."""
    firsts = np.cumsum([0, *(shard.num_rows for shard in dataset.info.shards)])
    with Progress("read examples", sum(dataset.info.shards[i].num_rows for i in shards), "rows") as progress:
        for i in shards:
            table = read_examples(dataset, dataset.info.shards[i])
            source = table["source"].combine_chunks().dictionary_encode()
            records = map(_record, table["source"].to_pylist(), table["key"].to_pylist())
            yield ExampleLines(
                table["row"].to_numpy() + firsts[i],
                np.fromiter(records, np.uint64, len(table)),
                source.indices.to_numpy().astype(np.int64),
                source.dictionary.to_pylist(),
            )
            progress.advance(dataset.info.shards[i].num_rows)


def rejected_to_parts(dataset: Dataset, parts: Parts, unseen: Callable[[str, int], int]) -> Parts:
    """The part of each line of rejected.jsonl.

    A record that was cut to fit has a line, but is in rows: the line goes to the part of the first of them that is in
    one. A rejected record is in none; unseen(source, hash) is its part.
    """
    named = [
        (line["source"], _record(line["source"], line["key"]), line["reason"] in NOT_WHOLE)
        for _, line in rejected_lines(dataset)
    ]
    cut = np.unique(np.array([record for _, record, is_cut in named if is_cut], np.uint64))
    owner = np.full(len(cut), NOWHERE, np.int8)
    for lines in example_lines(dataset, shards_of_rows(dataset.info, parts != NOWHERE)) if len(cut) else ():
        at = np.minimum(np.searchsorted(cut, lines.records), len(cut) - 1)
        found = (cut[at] == lines.records) & (owner[at] == NOWHERE) & (parts[lines.rows] != NOWHERE)
        owner[at[found][::-1]] = parts[lines.rows[found]][::-1]  # of two assignments the last one stands
    owners = dict(zip(cut.tolist(), owner.tolist(), strict=True))
    takes_all = not (parts == NOWHERE).any()  # then a record that is cut and in no row is one that no share asked for
    lines_parts = [
        unseen(source, record) if not is_cut or (takes_all and owners[record] == NOWHERE) else owners[record]
        for source, record, is_cut in named
    ]
    return np.array(lines_parts, np.int8)


def rejected_lines(dataset: Dataset) -> Iterator[tuple[bytes, dict[str, str]]]:
    """Each line of the dataset's rejected.jsonl, and what it says; ValueError where it says nothing."""
    path = f"{dataset.url}/rejected.jsonl"
    try:
        opened = fsspec.open(path, "rb").open()
    except FileNotFoundError:
        return
    with opened as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = json.loads(raw)
                _, _, _ = line["source"], line["key"], line["reason"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number}: wanted an object with source, key and reason (got {error!r}); build again"
                ) from None
            yield raw, line


def _record(source: str, key: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{source}\0{key}".encode(), digest_size=8).digest(), "little")


def _first_of_group(num_rows: int, left: np.ndarray, right: np.ndarray) -> Int64[np.ndarray, " rows"]:
    """The first row of each row's group, where left[i] and right[i] are in one group."""
    first = np.arange(num_rows)
    while True:
        low, high = np.minimum(first[left], first[right]), np.maximum(first[left], first[right])
        if np.array_equal(low, high):
            return first
        np.minimum.at(first, high, low)
        while not np.array_equal(jumped := first[first], first):
            first = jumped
