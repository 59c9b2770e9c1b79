"""The plan of all examples, from the lengths in the token store alone, and the list of what was not taken.

units    0 0 0 1 2 ...     number of the store file
records  0 1 1 0 3 ...     number in that file
parts    0 0 1 0 0 ...     of a record that was split
lengths  9 5 2 7 4 ...     tokens
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64

from lwm_data.engine import whole_file
from lwm_data.manifest import Books, Chats, DatasetManifest, Needles
from lwm_data.sources.fit import num_parts
from lwm_data.sources.record import Rejection
from lwm_data.token_store import StoreFile

SHOWN = 3  # bad records that an error message names
REMEDY = {"books": "set overflow: split", "chats": "set overflow: drop", "needles": "lower tokens.max"}


@dataclass(frozen=True)
class ExamplePlan:
    """units, records, parts, lengths: of each example, as drawn above, in the order of the input.

    records_of: source -> (records, rejected). reasons: of rejections and truncations -> records.
    """

    units: Int32[np.ndarray, " n"]
    records: Int32[np.ndarray, " n"]
    parts: Int32[np.ndarray, " n"]
    lengths: Int64[np.ndarray, " n"]
    records_of: dict[str, tuple[int, int]]
    reasons: dict[str, int]

    def order(self, seed: int) -> Int64[np.ndarray, " n"]:
        """A permutation of the examples, a function of `seed`; ours, so that no library can change it."""
        start = np.uint64(int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "little"))
        x = np.arange(1, len(self.lengths) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start  # splitmix64
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")


def plan_examples(
    manifest: DatasetManifest, sources: Sequence[Books | Chats | Needles], stores: Sequence[Path], rejected: Path
) -> ExamplePlan:
    """The plan of the store files `stores`, each of the source beside it; writes `rejected`, one JSON object a line.

    ValueError where a record does not fit a row under `overflow: error`, where a source has more bad records than
    `max_rejected` allows, and where nothing is left.
    """
    columns: list[tuple[np.ndarray, ...]] = []
    records_of = {source.name: [0, 0] for source in manifest.sources}
    reasons: Counter[str] = Counter()
    bad: dict[str, list[Rejection]] = {source.name: [] for source in manifest.sources}
    num_bad: Counter[str] = Counter()
    with whole_file(rejected) as file:
        for unit, (source, path) in enumerate(zip(sources, stores, strict=True)):
            store = StoreFile(path)
            damaged = store.rejections()
            num_bad[source.name] += len(damaged)
            bad[source.name] += damaged[: SHOWN - len(bad[source.name])]
            lengths, parts, notes = _fit_unit(manifest, source, store)
            for note in itertools.chain(damaged, notes):
                line = {"source": source.name, "key": note.key, "reason": note.reason, "detail": note.detail}
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                reasons[note.reason] += 1
            records_of[source.name][0] += len(store)
            records_of[source.name][1] += len(damaged) + sum(note.reason != "truncated" for note in notes)
            columns.append(_columns(unit, lengths, parts, manifest, source))
    for i, source in enumerate(manifest.sources):
        _refuse_bad(
            f"sources.{i}", records_of[source.name][0], num_bad[source.name], bad[source.name], manifest, rejected
        )
    units, records, all_parts, all_lengths = (np.concatenate(column) for column in zip(*columns, strict=True))
    if not len(units):
        raise ValueError(f"{manifest.name}: no record is left to build from; {rejected} tells why")
    return ExamplePlan(
        units,
        records,
        all_parts,
        all_lengths,
        {name: (of[0], of[1]) for name, of in records_of.items()},
        dict(sorted(reasons.items())),
    )


def _fit_unit(
    manifest: DatasetManifest, source: Books | Chats | Needles, store: StoreFile
) -> tuple[np.ndarray, np.ndarray, list[Rejection]]:
    """Length and number of parts of each record, and what is rejected or cut by the manifest's wish."""
    lengths = store.lengths()
    parts = np.where(lengths > 0, 1, 0)
    notes = []
    if isinstance(source, Books):
        least, most = source.tokens.min, source.tokens.max
        for i in np.flatnonzero((lengths > 0) & (lengths < least)).tolist():
            notes.append(Rejection(store.key(i), "too short", f"{lengths[i]:,} tokens; tokens.min is {least:,}"))
            parts[i] = 0
        for i in np.flatnonzero(lengths > most).tolist() if most is not None else ():
            notes.append(Rejection(store.key(i), "too long", f"{lengths[i]:,} tokens; tokens.max is {most:,}"))
            parts[i] = 0
    if manifest.packing == "naive":
        return lengths, parts, notes
    fitted = num_parts(lengths, manifest.row_length, source.overflow)
    for i in np.flatnonzero((parts > 0) & (lengths > manifest.row_length)).tolist():
        key, number = store.key(i), f"{lengths[i]:,} tokens"
        if source.overflow == "error":
            raise ValueError(
                f"{source.name}: {key}: {number} do not fit a row of {manifest.row_length:,} (row_length); "
                f"{REMEDY[source.type]}, or raise row_length"
            )
        if source.overflow == "truncate":
            notes.append(Rejection(key, "truncated", f"{number}; kept the first {manifest.row_length:,}"))
        elif source.overflow == "drop":
            notes.append(Rejection(key, "longer than a row", f"{number}; row_length is {manifest.row_length:,}"))
    return lengths, np.where(parts > 0, fitted, 0), notes


def _columns(
    unit: int, lengths: np.ndarray, parts: np.ndarray, manifest: DatasetManifest, source: Books | Chats | Needles
) -> tuple[np.ndarray, ...]:
    records = np.repeat(np.arange(len(lengths)), parts)
    firsts = np.repeat(np.cumsum(parts) - parts, parts)
    part = np.arange(len(records)) - firsts
    whole = lengths[records]
    if manifest.packing == "masked":
        left = whole - 1 - part * (manifest.row_length - 1)
        whole = np.minimum(np.minimum(left, manifest.row_length - 1) + 1, whole)
    return np.full(len(records), unit, np.int32), records.astype(np.int32), part.astype(np.int32), whole


def _refuse_bad(
    key: str, num_records: int, num_bad: int, bad: list[Rejection], manifest: DatasetManifest, rejected: Path
) -> None:
    if num_bad <= manifest.max_rejected * num_records:
        return
    shown = "".join(f"\n  {rejection.key}: {rejection.reason}: {rejection.detail}" for rejection in bad)
    more = f"\n  ... {num_bad - len(bad):,} more, in {rejected}" if num_bad > len(bad) else ""
    raise ValueError(
        f"{key}: {num_bad:,} of {num_records:,} records are bad, more than max_rejected ({manifest.max_rejected:g}) "
        f"allows; mend them, leave them out, or raise max_rejected:{shown}{more}"
    )
