"""Tokens: text that somebody tokenized before, with this tokenizer. No vision tokens: those come from pictures.

a.npy          a b $ ^ c d $ e          one stream, cut after EOS ($) and before BOS (^)
               a.npy:0   a.npy:3  a.npy:7       named by the place of its first token
a.parquet      id | input_ids | labels  a row each, as in .arrow and .jsonl

each           ^ a b $    BOS and EOS are added where they are missing; BOS is never trained
labels         -100 -100 b $            only b and $ are trained; a label stands at the token that is predicted
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int64

from lwm_data.format.example import Run
from lwm_data.format.vocab import TextTokenizer
from lwm_data.manifest_sources import Tokens
from lwm_data.sources.columns import Row, read_rows
from lwm_data.sources.fields import UnreadableField
from lwm_data.sources.files import DAMAGED, InputFile, open_unpacked
from lwm_data.sources.heldout import other_side
from lwm_data.sources.json_lines import MAX_LINE, JsonLine
from lwm_data.sources.objects import BATCH_ROWS, COLUMNS, kind_of, named_key, read_objects
from lwm_data.sources.record import UNREAD, Record, Rejection

VERSION = 2  # raise it when the same file gives other tokens
OPTIONS = {"field", "key", "trained", "labels", "split"}  # of the source, that tokens depend on
NOT_TRAINED = -100  # the label of a token that is not trained
PADDING_MASK = "attention_mask"  # where a row has it: 0 for ids that only fill it up
MAX_TOKENS = 1 << 25  # of one record
BLOCK = 1 << 20  # tokens of a stream that are read at a time
MAX_HEADER = 1 << 12  # bytes of a .npy's header
HEADER = re.compile(r"\{'descr': '([<>|][iu][1248])', 'fortran_order': (?:True|False), 'shape': \((\d{1,15}),\), ?\}")


class _Refused(Exception):
    """What is no record: a reason, one of few, and the detail."""


def read_tokens(source: Tokens, file: InputFile, tokenizer: TextTokenizer) -> Iterator[Record | Rejection]:
    """The records of `file`."""
    kind = kind_of(file)
    if kind == "npy":
        yield from _read_stream(source, file, tokenizer)
        return
    lists = {source.field, source.trained or source.field, source.labels or source.field, PADDING_MASK}
    names = lists | {source.key or "id"}
    if kind in COLUMNS:
        for row in read_rows(file, BATCH_ROWS, names):
            yield row if isinstance(row, Rejection) else _of_row(source, file, row, tokenizer)
    else:
        for found in read_objects(file, names):
            yield found if isinstance(found, Rejection) else _of_object(source, found, tokenizer)


def _of_row(source: Tokens, file: InputFile, row: Row, tokenizer: TextTokenizer) -> Record | Rejection:
    place = f"{file.key}:{row.number}"
    if row.num_bytes() > MAX_LINE:
        return Rejection(place, "too large", f"a row of {row.num_bytes():,} bytes; wanted {MAX_LINE:,} or fewer")
    name = source.key or "id"
    try:
        fields: dict[str, Any] = {name: row.fields.find(name)}
    except UnreadableField as error:
        return Rejection(place, *error.args)
    lists = [name for name in (source.field, source.trained, source.labels, PADDING_MASK) if name is not None]
    fields |= {column: row.value(column) for column in lists if row.batch.schema.get_field_index(column) >= 0}
    return _of_object(source, JsonLine(place, fields), tokenizer)


def _of_object(source: Tokens, found: JsonLine, tokenizer: TextTokenizer) -> Record | Rejection:
    if not isinstance(found.value, dict):
        got = type(found.value).__name__
        return Rejection(found.key, "not an object", f"got {got}; wanted an object with {source.field}")
    key = named_key(found.value, source.key, found.key)
    if isinstance(key, Rejection):
        return key
    filtered = other_side(source.split, key)
    if filtered is not None:
        return filtered
    try:
        ids = _numbers(found.value, source.field)
        whole = _without_padding(found.value, len(ids))
        return Record(key, _runs(ids[whole], _is_trained(source, found.value, ids, whole), tokenizer))
    except _Refused as refused:
        return Rejection(key, *refused.args)


def _numbers(fields: dict[str, Any], name: str) -> Int64[np.ndarray, " n"]:
    """The list of numbers under `name`."""
    value = fields.get(name)
    if isinstance(value, pa.Scalar):
        items = value.values if isinstance(value, pa.ListScalar) and value.is_valid else None
        if items is not None and pa.types.is_integer(items.type) and not items.null_count:
            return np.asarray(items).astype(np.int64)
        value = None if not value.is_valid else value.type
    if value is None:
        raise _Refused("missing field", f"{name}: there is none")
    if not isinstance(value, list) or set(map(type, value)) - {int, bool}:
        raise _Refused("wrong field", f"{name}: got {str(value)[:60]}; wanted one flat list of whole numbers")
    try:
        return np.array(value, np.int64)
    except OverflowError:
        raise _Refused("unknown id", f"{name}: a number of more than 64 bits") from None


def _without_padding(fields: dict[str, Any], num_ids: int) -> slice:
    """The ids that are no padding; all of them where the row does not say."""
    mask = fields.get(PADDING_MASK)
    if mask is None or (isinstance(mask, pa.Scalar) and not mask.is_valid):
        return slice(0, num_ids)
    marks = _marks(fields, PADDING_MASK, num_ids)
    kept = np.flatnonzero(marks)
    if not len(kept):
        raise _Refused("empty", f"{PADDING_MASK} is 0 for each of {num_ids:,} ids")
    if kept[-1] - kept[0] + 1 != len(kept):
        hole = int(kept[0] + np.flatnonzero(marks[kept[0] :] == 0)[0])
        raise _Refused("wrong field", f"{PADDING_MASK}.{hole}: got 0 between ids; wanted it at the ends alone")
    return slice(int(kept[0]), int(kept[-1]) + 1)


def _marks(fields: dict[str, Any], name: str, num_ids: int) -> Int64[np.ndarray, " n"]:
    """The list under `name`, a 0 or 1 for each id."""
    marks = _of_each_id(fields, name, num_ids)
    if len(marks) and not 0 <= marks.min() <= marks.max() <= 1:
        raise _Refused("wrong field", f"{name}: got {marks.min()} to {marks.max()}; wanted 0 or 1 for each id")
    return marks


def _of_each_id(fields: dict[str, Any], name: str, num_ids: int) -> Int64[np.ndarray, " n"]:
    marks = _numbers(fields, name)
    if len(marks) != num_ids:
        raise _Refused("wrong field", f"{name}: {len(marks):,} of them for {num_ids:,} ids")
    return marks


def _is_trained(
    source: Tokens, fields: dict[str, Any], ids: Int64[np.ndarray, " n"], whole: slice
) -> Bool[np.ndarray, " m"]:
    """Of each id in `whole`."""
    if source.trained is not None:
        return np.asarray(_marks(fields, source.trained, len(ids))[whole] == 1)
    if source.labels is None:
        return np.ones(whole.stop - whole.start, np.bool_)
    marks = _of_each_id(fields, source.labels, len(ids))[whole]
    is_trained: Bool[np.ndarray, " m"] = marks != NOT_TRAINED
    differs = np.flatnonzero(is_trained & (marks != ids[whole]))
    if len(differs):
        i = int(differs[0])
        place = whole.start + i
        detail = f"{source.labels}.{place}: got {marks[i]} at id {ids[place]}; wanted the same id, or {NOT_TRAINED}"
        raise _Refused("labels differ", detail)
    return is_trained


def _runs(
    ids: Int64[np.ndarray, " n"], is_trained: Bool[np.ndarray, " n"], tokenizer: TextTokenizer
) -> tuple[Run, ...]:
    """Runs of `ids` between BOS and EOS, which are added where they are missing. _Refused."""
    wrong = np.flatnonzero((ids < 0) | (ids >= tokenizer.vocab_size))
    if len(wrong):
        got = f"number {wrong[0]:,} is {ids[wrong[0]]}"
        raise _Refused("unknown id", f"{got}; tokenizer {tokenizer.name} has 0 to {tokenizer.vocab_size - 1}")
    if len(ids) > MAX_TOKENS:
        raise _Refused("too large", f"{len(ids):,} tokens; wanted {MAX_TOKENS:,} or fewer")
    start = int(len(ids) > 0 and ids[0] == tokenizer.bos)
    has_eos = len(ids) > start and ids[-1] == tokenizer.eos
    if len(ids) == start + has_eos:
        raise _Refused("empty", "no token besides BOS and EOS")
    tokens = np.concatenate([[tokenizer.bos], ids[start:], [] if has_eos else [tokenizer.eos]]).astype(np.int32)
    trained = np.concatenate([[False], is_trained[start:], [] if has_eos else is_trained[-1:]]).astype(np.bool_)
    if not trained.any():
        raise _Refused("nothing trained", f"{len(ids):,} tokens, and none of them is trained")
    ends = [*(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), len(tokens)]
    starts = [0, *ends[:-1]]
    return tuple(Run(tokens[a:b], is_vision=False, trained=bool(trained[a])) for a, b in zip(starts, ends, strict=True))


def _read_stream(source: Tokens, file: InputFile, tokenizer: TextTokenizer) -> Iterator[Record | Rejection]:
    if source.trained or source.labels:
        raise ValueError(f"{file.path}: got a stream of tokens; trained and labels are for rows with columns")
    first = 0  # the place of the next document's first token
    try:
        with open_unpacked(file.path) as raw:
            for ids, num_tokens in _documents(_blocks(raw), tokenizer):
                key = f"{file.key}:{first}"
                first += num_tokens
                if np.isin(ids, (tokenizer.bos, tokenizer.eos)).all():  # a separator that stands twice
                    continue
                filtered = other_side(source.split, key)
                try:
                    yield filtered or Record(key, _runs(ids, np.ones(len(ids), np.bool_), tokenizer))
                except _Refused as refused:
                    reason, detail = refused.args
                    yield Rejection(key, reason, detail)
    except _Refused as refused:
        yield Rejection(f"{file.key}:{first}", UNREAD, ": ".join(refused.args) + "; the rest is not read")
    except DAMAGED as error:
        yield Rejection(f"{file.key}:{first}", UNREAD, f"cannot be unpacked: {error}; the rest is not read")


def _blocks(raw: BinaryIO) -> Iterator[Int64[np.ndarray, " n"]]:
    """The numbers of a .npy, some at a time."""
    dtype, total = _header(raw)
    left = total
    while left > 0:
        data = raw.read(min(left, BLOCK) * dtype.itemsize)
        left -= len(data) // dtype.itemsize
        whole = len(data) // dtype.itemsize * dtype.itemsize
        if whole:
            yield np.frombuffer(data[:whole], dtype).astype(np.int64)
        if not data or whole < len(data):
            raise _Refused("cut", f"{left:,} of {total:,} tokens are missing")


def _header(raw: BinaryIO) -> tuple[np.dtype[Any], int]:
    """The type and number of a .npy's numbers. NumPy's own parser lets errors of Python's parser through."""
    start = raw.read(8)
    size = raw.read(2 if start[6:7] == b"\x01" else 4)
    if start[:6] != b"\x93NUMPY" or len(size) < 2:
        raise _Refused("wrong file", "no .npy")
    header = raw.read(min(int.from_bytes(size, "little"), MAX_HEADER)).decode("latin-1")
    found = HEADER.fullmatch(header.strip())
    if found is None:
        got = " ".join(header.split())[:100]
        raise _Refused("wrong field", f"got {got}; wanted one row of uint16, uint32 or int32")
    return np.dtype(found[1]), int(found[2])


def _documents(
    blocks: Iterator[Int64[np.ndarray, " n"]], tokenizer: TextTokenizer
) -> Iterator[tuple[Int64[np.ndarray, " n"], int]]:
    """Each document's tokens and their number; of one that is too large, just enough to tell."""
    held: list[np.ndarray] = []
    num_held = num_tokens = 0
    for block in blocks:
        cuts = np.flatnonzero(block == tokenizer.eos) + 1
        if tokenizer.bos != tokenizer.eos:
            cuts = np.union1d(cuts, np.flatnonzero(block == tokenizer.bos))
        start = 0
        for stop in [*cuts.tolist(), len(block)]:
            if stop > start and num_held <= MAX_TOKENS:
                held.append(block[start:stop])
                num_held += stop - start
            num_tokens += stop - start
            is_cut = stop < len(block) or (len(cuts) > 0 and cuts[-1] == stop)
            if is_cut and num_tokens:
                yield np.concatenate(held), num_tokens
                held, num_held, num_tokens = [], 0, 0
            start = stop
    if num_tokens:
        yield np.concatenate(held), num_tokens
