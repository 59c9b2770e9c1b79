"""Datasets from datasets: merge, split, subset. Rows are copied as they are packed; nothing is tokenized again.

merge    a a a a | b b         keep: shards one after another, carried as files      mix: a b a a b a
split    a a a a a a           to parts by draw, or by document: train a a a a a, valid a
subset   a a a a a a           rows in a range, a drawn fraction, rows of some sources alone

The result is a dataset like any other. Its index's `manifest` says what was done to which datasets; its build
fingerprint is made from that. So a verb that was killed leaves no dataset and, run again, gives the same bytes, and
one that is finished finds nothing to do.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lwm_data.derived_dataset import (
    Derived,
    Write,
    carry_shards,
    copy_shards,
    derive_dataset,
    derived_info,
    is_carried,
    new_shards,
    summed_sources,
    verify_shards,
)
from lwm_data.example_plan import NOT_WHOLE
from lwm_data.format.dataset import Dataset, DatasetInfo, SourceCounts, open_dataset
from lwm_data.row_choice import (
    NOWHERE,
    Parts,
    drawn,
    leave_out_other_sources,
    mixed_rows,
    parts_by_document,
    parts_by_row,
    rejected_lines,
    rejected_to_parts,
    rows_of_part,
    shards_of_rows,
)
from lwm_data.row_copy import CopyFormat, num_split_records
from lwm_data.work_folder import WorkFolder

SAME = ("row_length", "packing", "loss_weighting", "tokenizer_fingerprint")  # of merged datasets
MAX_PARTS = 100

ORDERS = ("keep", "mix")
BYS = ("row", "document")


def merge(
    datasets: Sequence[str | Path],
    out: str | Path,
    *,
    order: str = "keep",
    seed: int = 0,
    name: str | None = None,
    link: bool = True,
    workers: int = 1,
) -> Derived:
    """The rows of all `datasets`: one after another, or each spread evenly over the whole (`mix`).

    link: carried shards are the same files under another name, where the file system can do that. ValueError where
    the datasets differ in what a dataset has only one of.
    """
    if order not in ORDERS:
        raise ValueError(f"order: got {order}; wanted {' or '.join(ORDERS)}")
    inputs = [open_dataset(url) for url in datasets]
    if len(inputs) < 2:
        raise ValueError(f"merge: got {len(inputs)} dataset; wanted two or more")
    _refuse_differences(inputs)
    infos = [dataset.info for dataset in inputs]
    dtype = "uint32" if any(info.dtype == "uint32" for info in infos) else "uint16"
    name = name or "+".join(dict.fromkeys(info.name for info in infos))
    described: dict[str, Any] = {"kind": "merge", "name": name, "order": order}
    described |= {"seed": seed} if order == "mix" else {}

    def plan() -> Write:
        copied = [order == "mix" or not is_carried(info, dtype) for info in infos]
        read = [range(len(of.shards) if is_read else 0) for of, is_read in zip(infos, copied, strict=True)]
        verify_shards(inputs, read, workers)
        return write

    def write(work: WorkFolder, fingerprint: str) -> DatasetInfo:
        with work.planned_rejected() as file:
            for raw, _ in itertools.chain.from_iterable(map(rejected_lines, inputs)):
                file.write(raw)
        work.begin(fingerprint)
        form = _format(work.out, inputs, dtype)
        if order == "mix":
            units = new_shards(
                mixed_rows([info.num_rows for info in infos], seed),
                max(of.num_rows for info in infos for of in info.shards),
            )
            records = copy_shards(work, form, units, sum(info.num_rows for info in infos), workers)
            shards = [record.shard for record in records]
        else:
            shards = carry_shards(work, form, inputs, link, workers)
        reasons = sum((Counter(info.rejected) for info in infos), Counter[str]())
        return derived_info(inputs, shards, infos, summed_sources(info.sources for info in infos), reasons, dtype)

    return derive_dataset(Path(out), inputs, described, plan, link=link)


def split(
    dataset: str | Path,
    out: str | Path,
    shares: Sequence[float],
    names: Sequence[str],
    *,
    by: str = "row",
    seed: int = 0,
    workers: int = 1,
) -> list[Derived]:
    """Every row in one of the parts `names`, datasets in folders of `out` that are called so.

    by: `row` draws for each row; `document` puts rows that share a record in one part.
    """
    if by not in BYS:
        raise ValueError(f"by: got {by}; wanted {' or '.join(BYS)}")
    _check_parts(shares, names)
    source = open_dataset(dataset)
    shares = [share / sum(shares) for share in shares]  # three times 0.3333 leaves no row out

    @cache
    def choice() -> tuple[Parts, Parts]:
        parts, groups = parts_by_row(source.info.num_rows, shares, seed), ""
        if by == "document":
            parts, num, largest = parts_by_document(source, shares, seed)
            groups = f" (rows that share documents form {num:,} groups, the largest of {largest:,} rows)"
        for part, name in enumerate(names):
            if not (parts == part).any():
                raise ValueError(
                    f"split: part {name} (share {shares[part]:g}) would have none of the {len(parts):,} rows{groups}; "
                    f"give it a larger share{', or split by row' if groups else ', or take another seed'}"
                )
        ends = np.cumsum(shares)
        last = len(shares) - 1

        def unseen(name: str, record: int) -> int:
            return min(last, int(np.searchsorted(ends, drawn(f"{seed}|{record}", 0, 1)[0], side="right")))

        lines = rejected_to_parts(source, parts, unseen)
        verify_shards([source], [range(len(source.info.shards))], workers)
        return parts, lines

    made: list[Derived] = []
    for part, name in enumerate(names):
        described = {"kind": "split", "name": f"{source.info.name}-{name}", "part": name, "by": by, "seed": seed}
        described["parts"] = dict(zip(names, map(float, shares), strict=True))
        before = [of.info for of in made] if part == len(names) - 1 else None
        kept = tuple(source.info.sources)
        made.append(_take(source, Path(out) / name, described, choice, part, kept, workers, before))
    return made


def subset(
    dataset: str | Path,
    out: str | Path,
    *,
    rows: tuple[int | None, int | None] | None = None,
    fraction: float | None = None,
    sources: Sequence[str] = (),
    seed: int = 0,
    name: str | None = None,
    workers: int = 1,
) -> Derived:
    """The rows that meet every condition given.

    rows: from, up to but without; None is the beginning or the end. fraction: drawn with `seed`. sources: all that a
    row may hold examples of.
    """
    source = open_dataset(dataset)
    info = source.info
    start, stop = row_range(rows, info.num_rows)
    if rows is None and fraction is None and not sources:
        raise ValueError("subset: no condition given; name --rows, --fraction or --source")
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"fraction: got {fraction:g}; wanted more than 0 and at most 1")
    for wanted in sources:
        if wanted not in info.sources:
            raise ValueError(f"source: got {wanted}; {dataset} has {', '.join(info.sources)}")
    kept = tuple(of for of in info.sources if of in sources or not sources)

    def choice() -> tuple[Parts, Parts]:
        parts = np.zeros(info.num_rows, np.int8)
        if fraction is not None:
            parts = parts_by_row(info.num_rows, [fraction], seed)
        parts[:start] = parts[stop:] = NOWHERE
        if sources:
            leave_out_other_sources(source, parts, kept)
        if not (parts == 0).any():
            of = f" that holds examples of {', '.join(kept)} alone" if sources else ""
            raise ValueError(
                f"subset: none of the rows {start:,} to {stop - 1:,} of {dataset}{of} is taken; ask for more"
                + (", or build a dataset of these sources" if sources else "")
            )
        lines = rejected_to_parts(source, parts, lambda of, _: 0 if of in kept else NOWHERE)
        verify_shards([source], [shards_of_rows(info, parts == 0)], workers)
        return parts, lines

    described: dict[str, Any] = {"kind": "subset", "name": name or f"{info.name}-subset"}
    described |= {"rows": None if rows is None else [start, stop], "sources": list(kept) if sources else None}
    described |= {} if fraction is None else {"fraction": float(fraction), "seed": seed}
    return _take(source, Path(out), described, choice, 0, kept, workers)


def row_range(rows: tuple[int | None, int | None] | None, num_rows: int) -> tuple[int, int]:
    """First row and the one after the last; ValueError where there are no such rows."""
    start, stop = (0, num_rows) if rows is None else (rows[0] or 0, num_rows if rows[1] is None else rows[1])
    if not 0 <= start < stop <= num_rows:
        raise ValueError(f"rows: got {start}:{stop}; the dataset has rows 0:{num_rows}")
    return start, stop


def _take(
    source: Dataset,
    out: Path,
    described: dict[str, Any],
    choice: Callable[[], tuple[Parts, Parts]],
    part: int,
    kept: Sequence[str],
    workers: int,
    before: Sequence[DatasetInfo] | None = None,
) -> Derived:
    """The rows of one part of a choice as a dataset, its counts those of the sources `kept`.

    before: the other parts, for the last one, which counts what no share asked for: it lies in no row of any.
    """

    def plan() -> Write:
        parts, lines = choice()

        def write(work: WorkFolder, fingerprint: str) -> DatasetInfo:
            reasons: dict[str, Counter[str]] = {name: Counter() for name in kept}
            with work.planned_rejected() as file:
                for (raw, line), owner in zip(rejected_lines(source), lines, strict=True):
                    if owner == part:
                        file.write(raw)
                        reasons[line["source"]][line["reason"]] += 1
            work.begin(fingerprint)
            form = _format(work.out, [source], source.info.dtype)
            units = new_shards(rows_of_part(parts, part), max(of.num_rows for of in source.info.shards))
            records = copy_shards(work, form, units, int((parts == part).sum()), workers)
            counted = summed_sources(record.sources for record in records)
            shards = [record.shard for record in records]
            num_split = sum((num_split_records(work.out, shard) for shard in shards), Counter[str]())
            sources = {}
            for name in kept:
                of, why = counted.get(name, SourceCounts()), reasons[name]
                rejected = sum(count for reason, count in why.items() if reason not in NOT_WHOLE)
                numbers = {"records": of.records + rejected, "rejected": rejected, "left_out": 0}
                if before is not None and any(of.left_out for of in source.info.sources.values()):
                    whole, others = source.info.sources[name], [info.sources[name] for info in before]
                    num_split[name] = whole.split - sum(of.split for of in others)
                    for field in ("records", "left_out"):
                        numbers[field] = getattr(whole, field) - sum(getattr(of, field) for of in others)
                why += Counter({"split": num_split[name]})  # counted, but not named in rejected.jsonl
                sources[name] = of.model_copy(update={**numbers, "reasons": dict(sorted(why.items()))})
            told = sum(sources.values(), SourceCounts()).reasons
            return derived_info([source], shards, records, sources, told, source.info.dtype)

        return write

    return derive_dataset(out, [source], described, plan)


def _format(out: Path, inputs: Sequence[Dataset], dtype: str) -> CopyFormat:
    read = tuple((dataset.url, dataset.info) for dataset in inputs)
    tokenizer = inputs[0].text_tokenizer
    return CopyFormat(out, read, dtype, tokenizer.bos, tokenizer.eos)


def _refuse_differences(inputs: Sequence[Dataset]) -> None:
    first = inputs[0]
    for other in inputs[1:]:
        differ = [
            f"{field}: {getattr(first.info, field)} and {getattr(other.info, field)}"
            for field in SAME
            if getattr(first.info, field) != getattr(other.info, field)
        ]
        if differ:
            raise ValueError(
                f"merge: {first.url} and {other.url} differ in {'; '.join(differ)}; build one of them again so that "
                "they agree (a token store makes that cheap)"
            )
    vision = {dataset.info.vision_tokenizer_fingerprint: dataset.url for dataset in inputs}
    vision.pop(None, None)
    if len(vision) > 1:
        differ = [f"{url} has {fingerprint}" for fingerprint, url in vision.items()]
        raise ValueError(f"merge: vision_tokenizer_fingerprint: {'; '.join(differ)}; wanted one for all")


def _check_parts(shares: Sequence[float], names: Sequence[str]) -> None:
    if len(shares) < 2 or not all(0 < share < 1 for share in shares) or abs(sum(shares) - 1) > 1e-3:  # nan is not
        raise ValueError(f"parts: got {','.join(f'{of:g}' for of in shares)}; wanted two or more shares that sum to 1")
    if len(shares) > MAX_PARTS:
        raise ValueError(f"parts: got {len(shares)}; wanted at most {MAX_PARTS}")
    if len(names) != len(shares):
        raise ValueError(f"names: got {len(names)} for {len(shares)} parts; wanted one for each")
    wrong = [name for name in names if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name)]
    if wrong or len(set(names)) < len(names):
        raise ValueError(f"names: got {','.join(names)}; wanted different names of letters, digits, _, . and -")
