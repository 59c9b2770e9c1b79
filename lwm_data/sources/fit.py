"""Fits records to rows: a record longer than a row is split, cut off, dropped, or an error, as the manifest says.

    record (11 tokens)   ^ a b c d e f g h i $
    split, rows of 5     ^ a b c d | ^ e f g h | ^ i $      each part begins with BOS; the last one ends with EOS
    truncate             ^ a b c d

It is decided from lengths alone; tokens are cut when a row is written. Under `packing: naive` nothing is fitted: rows
cut wherever they end.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64

from lwm_data.format.example import Example, Run
from lwm_data.manifest import Overflow
from lwm_data.sources.record import Record


def num_parts(num_tokens: Int64[np.ndarray, " n"], row_length: int, overflow: Overflow) -> Int64[np.ndarray, " n"]:
    """The number of examples that records of these lengths become (0: dropped); longer than a row: by `overflow`."""
    if overflow == "split":
        parts = np.maximum(1, -(-(num_tokens - 1) // (row_length - 1)))
    else:
        parts = np.where(num_tokens <= row_length, 1, 1 if overflow == "truncate" else 0)
    return np.asarray(parts, np.int64)


def fit(record: Record, source: str, part: int, row_length: int, overflow: Overflow) -> Example:
    """Part `part` of `record` as an example of at most `row_length` tokens."""
    num_tokens = sum(len(run.tokens) for run in record.runs)
    if num_tokens <= row_length:
        return Example(source, record.key, part, record.runs)
    if overflow == "truncate":
        return Example(source, record.key, part, _cut(record.runs, 0, row_length))
    assert overflow == "split", f"{overflow} leaves no part of a record of {num_tokens}"
    first = 1 + part * (row_length - 1)
    bos = _cut(record.runs, 0, 1)
    return Example(source, record.key, part, bos + _cut(record.runs, first, first + row_length - 1))


def _cut(runs: tuple[Run, ...], start: int, stop: int) -> tuple[Run, ...]:
    """tokens start..stop of `runs`, which are text there: a vision block is never cut."""
    inside = []
    begin = 0
    for run in runs:
        tokens = run.tokens[max(0, start - begin) : max(0, stop - begin)]
        begin += len(run.tokens)
        if len(tokens):
            assert not run.is_vision, "a vision block is never cut"
            inside.append(Run(tokens, run.is_vision, run.trained))
    return tuple(inside)
