"""The plan of all examples, from the lengths in the token store alone, and the list of what was not taken.

sources  0 0 0 0 1 ...     number in the manifest
units    0 0 0 1 2 ...     number of the store file
records  0 1 1 0 3 ...     number in that file
parts    0 0 1 0 0 ...     of a record that was split
lengths  9 5 2 7 4 ...     tokens
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Int32, Int64

from lwm_data.folder import Folder
from lwm_data.format.index import SourceCounts
from lwm_data.manifest import DatasetManifest
from lwm_data.manifest_sources import AnySource, Books, Images, Needles, Text, Tokens, Videos
from lwm_data.sources.chats import LEFT_OUT
from lwm_data.sources.clean import NO_MARK
from lwm_data.sources.fit import FRAME, RunShape, is_plain, num_text_parts, part_lengths
from lwm_data.sources.record import UNREAD, Rejection
from lwm_data.token_store import StoreFile
from lwm_data.unwanted import Unwanted
from lwm_data.work_folder import WorkFolder

SHOWN = 3  # bad records that an error message names
REMEDY = {"books": "split", "text": "split", "tokens": "split", "videos": "thin"}
FILTERED = "filtered: "  # reasons that begin so are the manifest's wish, and nothing bad
NOT_WHOLE = ("truncated", "thinned", "part not trained", NO_MARK, LEFT_OUT)  # of records that are taken all the same


@dataclass(frozen=True)
class ExamplePlan:
    """sources, units, records, parts, lengths: of each example, as drawn above, in the order of the input.

    counts_of: source -> its records, those rejected, and why records were rejected, cut or split.
    """

    sources: Int32[np.ndarray, " n"]
    units: Int32[np.ndarray, " n"]
    records: Int32[np.ndarray, " n"]
    parts: Int32[np.ndarray, " n"]
    lengths: Int64[np.ndarray, " n"]
    counts_of: dict[str, SourceCounts]


def plan_examples(
    manifest: DatasetManifest,
    sources: Sequence[AnySource],
    store: Folder,
    names: Sequence[str],
    marks: Sequence[str | None],
    work: WorkFolder,
) -> ExamplePlan:
    """The plan of the files `names` of the token store, each of the source beside it; writes rejected.jsonl to `work`.

    marks: the name of each one's marks (text_marks.py), None where it has none.

    ValueError where a record does not fit a row under `overflow: error`, where a file of texts is not read to its end
    under `damaged: error`, where a source has more bad records than `max_rejected` allows (of those that the manifest
    does not filter), and where nothing is left.
    """
    columns: list[tuple[np.ndarray, ...]] = []
    counts_of = {source.name: SourceCounts() for source in manifest.sources}
    bad: dict[str, list[Rejection]] = {source.name: [] for source in manifest.sources}
    num_bad: Counter[str] = Counter()
    num_filtered: Counter[str] = Counter()
    unread: list[list[Rejection]] = [[] for _ in manifest.sources]
    numbers = {source.name: number for number, source in enumerate(manifest.sources)}
    unwanted = Unwanted(manifest, sources, store, names, marks, partial(_taken, manifest))
    with work.planned_rejected() as file:
        for unit, (source, name) in enumerate(zip(sources, names, strict=True)):
            tokens = StoreFile.without_tokens(store, name)
            damaged = tokens.rejections()
            wrong = [rejection for rejection in damaged if not rejection.reason.startswith(FILTERED)]
            num_filtered[source.name] += len(damaged) - len(wrong)
            num_bad[source.name] += len(wrong)
            if manifest.damaged == "error" and not isinstance(source, Images | Videos):
                unread[numbers[source.name]] += [rejection for rejection in wrong if rejection.reason == UNREAD]
            bad[source.name] += wrong[: SHOWN - len(bad[source.name])]
            fitted, notes = _fit_unit(manifest, source, tokens, unwanted.of(unit))
            notes += tokens.notes()
            reasons: Counter[str] = Counter()
            for note in itertools.chain(damaged, notes):
                line = {"source": source.name, "key": note.key, "reason": note.reason, "detail": note.detail}
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                reasons[note.reason] += 1
            if num_split := int((fitted.parts > 1).sum()):
                reasons["split"] += num_split
            counts_of[source.name] += SourceCounts(
                records=len(tokens),
                rejected=int((fitted.parts == 0).sum()),
                reasons=reasons,
            )
            columns.append((np.full(len(fitted.of), numbers[source.name], np.int32), *_columns(unit, fitted)))
    rejected = work.planned_rejected_name
    for i, source in enumerate(manifest.sources):
        _refuse_unread(f"sources.{i}", unread[i], rejected)
        wanted = counts_of[source.name].records - num_filtered[source.name]
        _refuse_bad(f"sources.{i}", wanted, num_bad[source.name], bad[source.name], manifest, rejected)
    of_source, units, records, parts, lengths = (np.concatenate(column) for column in zip(*columns, strict=True))
    if not len(units):
        raise ValueError(f"{manifest.name}: no record is left to build from; {rejected} tells why")
    return ExamplePlan(
        of_source,
        units,
        records,
        parts,
        lengths,
        counts_of,
    )


@dataclass(frozen=True)
class _Fitted:
    """parts: of each record, the examples it becomes. of: of each example, its record; lengths: its tokens."""

    parts: Int64[np.ndarray, " records"]
    of: Int64[np.ndarray, " n"]
    lengths: Int64[np.ndarray, " n"]


def _taken(
    manifest: DatasetManifest, source: AnySource, store: StoreFile, unwanted: dict[int, Rejection]
) -> Bool[np.ndarray, " records"]:
    """Which of the store's records become examples."""
    return _fit_unit(manifest, source, store, unwanted)[0].parts > 0


def _fit_unit(
    manifest: DatasetManifest, source: AnySource, store: StoreFile, unwanted: dict[int, Rejection]
) -> tuple[_Fitted, list[Rejection]]:
    """What the store's records become, and what is rejected or cut by the manifest's wish."""
    lengths = store.lengths()
    lengths[list(unwanted)] = 0  # as of one that the source rejected
    parts = np.where(lengths > 0, 1, 0)
    notes = list(unwanted.values())
    if isinstance(source, Books | Text | Tokens):
        least, most = source.tokens.min, source.tokens.max
        for i in np.flatnonzero((lengths > 0) & (lengths < least)).tolist():
            notes.append(Rejection(store.key(i), "too short", f"{lengths[i]:,} tokens; tokens.min is {least:,}"))
            parts[i] = 0
        for i in np.flatnonzero(lengths >= most).tolist() if most is not None else ():
            notes.append(Rejection(store.key(i), "too long", f"{lengths[i]:,} tokens; wanted fewer than {most:,}"))
            parts[i] = 0
    walked: dict[int, list[int]] = {}  # record -> lengths of its parts, where lengths alone do not tell
    if manifest.packing == "masked":
        row_length = manifest.row_length
        fitted = num_text_parts(lengths, row_length, source.overflow)
        for i in np.flatnonzero((parts > 0) & (lengths > row_length)).tolist():
            shape = store.shape(i)
            num_untrained = 0
            if source.overflow == "thin" or not is_plain(shape):
                walked[i], num_untrained = _part_lengths(manifest, source, store.key(i), shape)
                fitted[i] = len(walked[i])
            if num_untrained:
                reason = ("nothing trained", "truncated")[fitted[i]] if fitted[i] < 2 else "part not trained"
                detail = (
                    f"{lengths[i]:,} tokens; in {num_untrained:,} of {num_untrained + fitted[i]:,} parts no token is"
                )
                notes.append(Rejection(store.key(i), reason, detail))
            else:
                notes += _overflow_note(manifest, source, store.key(i), int(lengths[i]), walked.get(i), int(fitted[i]))
        parts = np.where(parts > 0, fitted, 0)
    of = np.repeat(np.arange(len(parts)), parts)
    whole = lengths[of]
    if manifest.packing == "masked":
        part = np.arange(len(of)) - np.repeat(np.cumsum(parts) - parts, parts)
        left = whole - 1 - part * (manifest.row_length - 1)
        whole = np.minimum(np.minimum(left, manifest.row_length - 1) + 1, whole)
        firsts = np.cumsum(parts) - parts
        for i, of_parts in walked.items():
            whole[firsts[i] : firsts[i] + len(of_parts)] = of_parts
    return _Fitted(parts, of, whole), notes


def _part_lengths(
    manifest: DatasetManifest, source: AnySource, key: str, shape: tuple[RunShape, ...]
) -> tuple[list[int], int]:
    try:
        return part_lengths(shape, manifest.row_length, source.overflow)
    except ValueError as error:
        raise ValueError(f"{source.name}: {key}: {error}; raise row_length, or set overflow: drop") from error


def _overflow_note(
    manifest: DatasetManifest, source: AnySource, key: str, length: int, of_parts: list[int] | None, num_parts: int
) -> list[Rejection]:
    """What is told of a record of `length` tokens that is longer than a row."""
    number = f"{length:,} tokens"
    if source.overflow == "error":
        remedy = f"set overflow: {REMEDY.get(source.type, 'drop')}, or raise row_length"
        if isinstance(source, Needles):
            remedy = "lower tokens.max, or raise row_length"
        raise ValueError(
            f"{source.name}: {key}: {number} do not fit a row of {manifest.row_length:,} (row_length); {remedy}"
        )
    if num_parts == 0:
        return [Rejection(key, "longer than a row", f"{number}; row_length is {manifest.row_length:,}")]
    kept = of_parts[0] if of_parts else manifest.row_length
    if source.overflow == "truncate":
        return [Rejection(key, "truncated", f"{number}; kept the first {kept:,}")]
    if source.overflow == "thin":
        return [Rejection(key, "thinned", f"{number}; kept {kept:,}, with {(length - kept) // FRAME:,} frames fewer")]
    return []


def _columns(unit: int, fitted: _Fitted) -> tuple[np.ndarray, ...]:
    firsts = np.cumsum(fitted.parts) - fitted.parts
    part = np.arange(len(fitted.of)) - firsts[fitted.of]
    return np.full(len(part), unit, np.int32), fitted.of.astype(np.int32), part.astype(np.int32), fitted.lengths


def _refuse_unread(key: str, unread: list[Rejection], rejected: str) -> None:
    """Nobody knows how many records follow in a file that is not read to its end."""
    if not unread:
        return
    shown = "".join(f"\n  {rejection.key}: {rejection.detail}" for rejection in unread[:SHOWN])
    more = f"\n  ... {len(unread) - SHOWN:,} more, in {rejected}" if len(unread) > SHOWN else ""
    raise ValueError(
        f"{key}: {len(unread):,} of its files cannot be read to the end, so records are lost; fetch or write them "
        f"anew, leave them out, or set damaged: keep to take what comes before:{shown}{more}"
    )


def _refuse_bad(
    key: str, num_records: int, num_bad: int, bad: list[Rejection], manifest: DatasetManifest, rejected: str
) -> None:
    if num_bad <= manifest.max_rejected * num_records:
        return
    shown = "".join(f"\n  {rejection.key}: {rejection.reason}: {rejection.detail}" for rejection in bad)
    more = f"\n  ... {num_bad - len(bad):,} more, in {rejected}" if num_bad > len(bad) else ""
    raise ValueError(
        f"{key}: {num_bad:,} of {num_records:,} records are bad, more than max_rejected ({manifest.max_rejected:g}) "
        f"allows; mend them, leave them out, or raise max_rejected:{shown}{more}"
    )
