"""Which records are copies of an earlier one, from their marks alone; over all sources, in the manifest's order.

    records   0  1  2  3  4  5 ...     all store files' records in turn
    exact        a     a               equal content: the first stays
    near            b     b'           similar enough to one that stays: the first such stays

Near: signatures are cut in bands (their number and width by datasketch, for the threshold), and records with an equal
band are compared by their whole signatures, each with the last CANDIDATES kept ones of a band, so that pages of one
template take no quadratic time. Records are taken in order, and one is a duplicate only of one that is
kept: in a chain a ~ b ~ c where a and c differ, b goes and c stays.

Memory, at the peak: about 60 bytes for each record, and 40 for each band that it shares with another; 100 in all where
a tenth are near duplicates.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt32, UInt64

from lwm_data.folder import Folder
from lwm_data.text_marks import PERMUTATIONS, MarksFile
from lwm_data.token_store import OPEN_FILES

# Of datasketch's false positives and negatives: what a band lets through wrongly is compared afterwards, what it
# misses is lost. For 0.8 that gives 14 bands of 9, which miss 0.2% of pairs at 0.89; its default misses 11%.
WEIGHTS = (0.1, 0.9)
CANDIDATES = 64  # kept records of a band that one is compared with, the last ones
FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Duplicates:
    """records: duplicates, ascending; kept: the one that each is a copy of; similarity: 1 to 0, and 2 where equal."""

    records: Int64[np.ndarray, " n"]
    kept: Int64[np.ndarray, " n"]
    similarity: Float32[np.ndarray, " n"]


EXACT = 2.0


def find_duplicates(
    store: Folder, marks: Sequence[str], taken: Sequence[Bool[np.ndarray, " records"]], exact: bool, near: float | None
) -> Duplicates:
    """The duplicates among the records that are `taken`, of each of the files `marks` of the token store."""
    firsts = np.cumsum([0, *(len(of) for of in taken)])
    found: list[tuple[Any, Any, Any]] = []
    if exact:
        numbers, kept = _exact(store, marks, taken, firsts)
        found.append((numbers, kept, np.full(len(numbers), EXACT)))
    if near is not None:
        gone = found[0][0] if found else np.zeros(0, np.int64)
        found.append(_near(store, marks, taken, firsts, gone, near))
    if not found:
        return Duplicates(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    records, kept, similarity = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(records)
    records, kept, similarity = records[order], kept[order], similarity[order]
    # A text equal to one that is a near duplicate itself is a copy of what that one is a copy of.
    at = np.searchsorted(records, kept)
    at[at == len(records)] = 0
    chained = np.flatnonzero(records[at] == kept) if len(records) else at
    kept[chained], similarity[chained] = kept[at[chained]], similarity[at[chained]]
    return Duplicates(records, kept, similarity.astype(np.float32))


def _exact(
    store: Folder, marks: Sequence[str], taken: Sequence[np.ndarray], firsts: np.ndarray
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    contents, numbers = [], []
    for name, of, first in zip(marks, taken, firsts.tolist(), strict=False):
        content, valid = MarksFile(store.fetch(name)).contents()
        held = np.flatnonzero(of & valid)
        contents.append(content[held])
        numbers.append(held + first)
    content, number = np.concatenate(contents), np.concatenate(numbers)
    contents.clear()  # what follows is the peak of a plan's memory
    numbers.clear()
    order = np.lexsort((content[:, 1], content[:, 0]))  # stable: of equal ones the first stays first
    content, number = content[order], number[order]
    new = np.ones(len(number), np.bool_)
    new[1:] = (content[1:] != content[:-1]).any(axis=1)
    group_first = number[new][np.cumsum(new) - 1]
    return number[~new], group_first[~new]


def _near(
    store: Folder, marks: Sequence[str], taken: Sequence[np.ndarray], firsts: np.ndarray, gone: np.ndarray, near: float
) -> tuple[array[int], array[int], array[float]]:
    from datasketch import MinHashLSH

    lsh = MinHashLSH(threshold=near, num_perm=PERMUTATIONS, weights=WEIGHTS)
    left = [of.copy() for of in taken]
    gone = np.sort(gone)
    for unit, (start, stop) in enumerate(itertools.pairwise(np.searchsorted(gone, firsts).tolist())):
        left[unit][gone[start:stop] - firsts[unit]] = False
    members, groups, num_groups = _groups(store, marks, left, firsts, lsh.b, lsh.r)
    kept = np.zeros(len(members), np.int64)  # the records of each group that are kept, from its place in `starts` on
    starts = np.bincount(groups, minlength=num_groups)
    starts = np.cumsum(starts) - starts
    ends = starts.copy()
    signatures = _Signatures(store, marks, firsts)
    found = (array("q"), array("q"), array("d"))
    borders = np.flatnonzero(np.diff(members, prepend=-1, append=-1)).tolist()
    for start, stop in itertools.pairwise(borders):
        record = int(members[start])
        own = groups[start:stop]
        places = zip(starts[own].tolist(), ends[own].tolist(), strict=True)
        candidates = [kept[max(first, end - CANDIDATES) : end] for first, end in places if first < end]
        original, similarity = _first_similar(signatures, record, candidates, near)
        if original is None:
            kept[ends[own]] = record
            ends[own] += 1
        else:
            found[0].append(record)
            found[1].append(original)
            found[2].append(similarity)
    return found


def _groups(
    store: Folder, marks: Sequence[str], left: Sequence[np.ndarray], firsts: np.ndarray, num_bands: int, width: int
) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"], int]:
    """(record, group), by record, of all records that share a band with another one; the number of groups."""
    members, groups = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    num_groups = 0
    for band in range(num_bands):  # one at a time: all at once would take num_bands times the memory
        keys, numbers = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for name, of, first in zip(marks, left, firsts.tolist(), strict=False):
            signatures, valid = MarksFile(store.fetch(name)).signatures()
            held = np.flatnonzero(of & valid)
            keys.append(_keys(signatures[held, band * width : (band + 1) * width]))
            numbers.append(held + first)
        key = np.concatenate(keys)
        order = np.argsort(key, kind="stable")
        key = key[order]
        same = np.zeros(len(key) + 1, np.bool_)
        same[1:-1] = key[1:] == key[:-1]
        shared = np.flatnonzero(same[1:] | same[:-1])
        if len(shared):
            members.append(np.concatenate(numbers)[order[shared]])
            groups.append(num_groups + np.cumsum(~same[shared]) - 1)
            num_groups += int((~same[shared]).sum())
    member, group = np.concatenate(members), np.concatenate(groups)
    by_record = np.argsort(member, kind="stable")
    return member[by_record], group[by_record], num_groups


def _keys(bands: np.ndarray) -> UInt64[np.ndarray, " n"]:
    keys = np.zeros(len(bands), np.uint64)
    for column in bands.T:
        keys = (keys ^ column.astype(np.uint64)) * FACTOR
        keys ^= keys >> np.uint64(29)
    return keys


class _Signatures:
    """The signature of any record, by its number; the last OPEN_FILES files stay open."""

    def __init__(self, store: Folder, marks: Sequence[str], firsts: np.ndarray) -> None:
        self._store, self._marks, self._firsts = store, marks, firsts
        self._open: dict[int, np.ndarray] = {}

    def of(self, records: Int64[np.ndarray, " n"]) -> UInt32[np.ndarray, "n 128"]:
        """Those of `records`, which ascend."""
        places = np.searchsorted(records, self._firsts)
        units = np.flatnonzero(places[1:] > places[:-1]).tolist()
        parts = [self._file(unit)[records[places[unit] : places[unit + 1]] - self._firsts[unit]] for unit in units]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _file(self, unit: int) -> np.ndarray:
        if unit not in self._open:
            if len(self._open) >= OPEN_FILES:
                self._open.pop(next(iter(self._open)))
            self._open[unit] = MarksFile(self._store.fetch(self._marks[unit])).signatures()[0]
        return self._open[unit]


def _first_similar(
    signatures: _Signatures, record: int, candidates: Sequence[Int64[np.ndarray, " n"]], near: float
) -> tuple[int | None, float]:
    if not candidates:
        return None, 0.0
    others = np.unique(np.concatenate(candidates))
    similarities = (signatures.of(others) == signatures.of(np.array([record]))).mean(axis=1)
    first = int((similarities >= near).argmax())
    return (int(others[first]), float(similarities[first])) if similarities[first] >= near else (None, 0.0)
