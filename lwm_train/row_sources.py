"""Which examples lie in a row: from the table beside its shard (docs/format.md)."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import fsspec
import pyarrow.parquet as pq

from lwm_data.format.dataset import Dataset


@dataclass(frozen=True)
class RowExample:
    """An example, or a piece of one, in a row. segment: its number there, from 1."""

    segment: int
    source: str
    key: str
    part: int
    num_tokens: int


@dataclass(frozen=True)
class RowPlace:
    """Where a row lies, and what in it. row_in_shard: from 0."""

    shard: str
    row_in_shard: int
    examples: tuple[RowExample, ...]


def places_of(dataset: Dataset, rows: Iterable[int]) -> dict[int, RowPlace]:
    """Place and examples of each of the rows. ValueError where a shard's table cannot be read."""
    firsts = list(accumulate((shard.num_rows for shard in dataset.info.shards), initial=0))
    by_shard: dict[int, list[int]] = {}
    for row in sorted(set(rows)):
        by_shard.setdefault(bisect.bisect_right(firsts, row) - 1, []).append(row)
    found: dict[int, RowPlace] = {}
    for number, wanted in by_shard.items():
        name = dataset.info.shards[number].name
        held: dict[int, list[RowExample]] = {row - firsts[number]: [] for row in wanted}
        columns = ["row", "segment", "source", "key", "part", "num_tokens"]
        url = f"{dataset.url}/{name.removesuffix('.tar')}.examples.parquet"
        try:
            with fsspec.open(url, "rb") as file:
                table = pq.read_table(file, columns=columns, filters=[("row", "in", list(held))]).to_pydict()
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{url}: cannot be read ({error}); `lwm-data check` tells what else is wrong") from error
        for row, *example in zip(*(table[column] for column in columns), strict=True):
            held[row].append(RowExample(*example))
        found |= {firsts[number] + row: RowPlace(name, row, tuple(examples)) for row, examples in held.items()}
    return found
