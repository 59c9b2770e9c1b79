"""Fits records to rows: a record longer than a row is split, cut off, thinned out, dropped, or an error.

    text (11 tokens)     ^ a b c d e f g h i $
    split, rows of 5     ^ a b c d | ^ e f g h | ^ i $      each part begins with BOS; the last one ends with EOS
    truncate             ^ a b c d

    video (< F0 F1 F2 F3 >)       ^ < F0 F1 F2 F3 > a b $
    split, rows of 2 frames       ^ < F0 F1 > | ^ < F2 F3 > | ^ a b $       at a frame's border; every part is a block
    truncate                      ^ < F0 F1 >
    thin                          ^ < F0 F3 > a b $         frames are lost evenly, the first and the last are kept

A vision run stands between two text runs, its delimiters, and is never cut but at a frame's border, with the delimiters
and the end of vision made anew. All is decided from lengths alone; tokens are cut when a row is written. Under
`packing: naive` nothing is fitted: rows cut wherever they end.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int32, Int64

from lwm_data.format.example import Example, Run
from lwm_data.format.vocab import CODES_PER_FRAME, EOF, EOV
from lwm_data.manifest_sources import Overflow
from lwm_data.sources.record import Record

FRAME = CODES_PER_FRAME + 1  # tokens, with EOF or EOV


@dataclass(frozen=True)
class RunShape:
    """All of a run that matters to where it can be cut."""

    num_tokens: int
    is_vision: bool
    trained: bool = True


@dataclass(frozen=True)
class _Stretch:
    """Tokens start..stop of text run `run`."""

    run: int
    start: int
    stop: int

    def num_tokens(self, shape: Sequence[RunShape]) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class _Block:
    """The frames `frames` of vision run `run`, between their delimiters."""

    run: int
    frames: Int32[np.ndarray, " n"]

    def num_tokens(self, shape: Sequence[RunShape]) -> int:
        return len(self.frames) * FRAME + _delimiters(shape, self.run)


_Part = list[_Stretch | _Block]


def num_text_parts(num_tokens: Int64[np.ndarray, " n"], row_length: int, overflow: Overflow) -> Int64[np.ndarray, " n"]:
    """The number of examples that text records of these lengths become (0: dropped), by `overflow`."""
    if overflow == "split":
        parts = np.maximum(1, -(-(num_tokens - 1) // (row_length - 1)))
    else:
        parts = np.where(num_tokens <= row_length, 1, 1 if overflow == "truncate" else 0)
    return np.asarray(parts, np.int64)


def is_plain(shape: Sequence[RunShape]) -> bool:
    """Whether a record is text that is all trained but BOS; then `num_text_parts` tells all of its parts."""
    return not any(run.is_vision or not run.trained for run in shape[1:]) and shape[0].num_tokens == 1


def part_lengths(shape: Sequence[RunShape], row_length: int, overflow: Overflow) -> tuple[list[int], int]:
    """The tokens of each example that a record of this shape becomes, and how many more there would be.

    These are parts without a token that is trained: nobody would learn from them. A record that is dropped has no
    parts. ValueError where a row cannot hold a single frame.
    """
    parts, num_untrained = _parts(tuple(shape), row_length, overflow)
    return [sum(piece.num_tokens(shape) for piece in part) for part in parts], num_untrained


def fit(record: Record, source: str, part: int, row_length: int, overflow: Overflow) -> Example:
    """Part `part` of `record` as an example of at most `row_length` tokens."""
    shape = [RunShape(len(run.tokens), run.is_vision, run.trained) for run in record.runs]
    if sum(run.num_tokens for run in shape) <= row_length:
        return Example(source, record.key, part, record.runs)
    if is_plain(shape) and overflow != "thin":  # in one step, as a book can have any number of parts
        start, stop = 1 + part * (row_length - 1), 1 + (part + 1) * (row_length - 1)
        return Example(source, record.key, part, _cut(record.runs, 0, 1) + _cut(record.runs, start, stop))
    runs: list[Run] = []
    for piece in _parts(tuple(shape), row_length, overflow)[0][part]:
        whole = record.runs[piece.run]
        if isinstance(piece, _Stretch):
            runs.append(Run(whole.tokens[piece.start : piece.stop], whole.is_vision, whole.trained))
        else:
            block = whole.tokens.reshape(-1, FRAME)[piece.frames]  # a copy
            block[:, -1] = EOF
            block[-1, -1] = EOV
            runs += [
                record.runs[piece.run - 1],
                Run(block.reshape(-1), True, whole.trained),
                record.runs[piece.run + 1],
            ]
    return Example(source, record.key, part, tuple(runs))


def evenly(num_frames: int, kept: int) -> Int32[np.ndarray, " kept"]:
    """Which frames to keep: evenly spaced, both ends, fractions cut off, as the release does for `max_n_frames`."""
    return np.linspace(0, num_frames - 1, kept).astype(np.int32)


def _cut(runs: tuple[Run, ...], start: int, stop: int) -> tuple[Run, ...]:
    """tokens start..stop of `runs`, which are text."""
    inside = []
    begin = 0
    for run in runs:
        tokens = run.tokens[max(0, start - begin) : max(0, stop - begin)]
        begin += len(run.tokens)
        if len(tokens):
            inside.append(Run(tokens, run.is_vision, run.trained))
    return tuple(inside)


@lru_cache(maxsize=1024)  # the parts of one long video are asked for one at a time
def _parts(shape: tuple[RunShape, ...], row_length: int, overflow: Overflow) -> tuple[list[_Part], int]:
    """The parts, without those in which nothing is trained, and the number of these."""
    if overflow == "thin":
        parts = _thin(shape, row_length)
    elif overflow in ("split", "truncate"):
        parts = _fill(shape, row_length)[: 1 if overflow == "truncate" else None]
    else:
        parts = []
    kept = [part for part in parts if any(shape[piece.run].trained for piece in part[1:])]
    return kept, len(parts) - len(kept)


def _pieces(shape: Sequence[RunShape]) -> _Part:
    """The record in turn: stretches of text and whole blocks; BOS, its first token, is left out."""
    pieces: _Part = []
    skip = 1
    for i, run in enumerate(shape):
        if run.is_vision:
            pieces.append(_Block(i, np.arange(run.num_tokens // FRAME, dtype=np.int32)))
        elif not (_is_vision(shape, i - 1) or _is_vision(shape, i + 1)):
            if run.num_tokens > skip:
                pieces.append(_Stretch(i, skip, run.num_tokens))
            skip = max(0, skip - run.num_tokens)
    return pieces


def _is_vision(shape: Sequence[RunShape], i: int) -> bool:
    return 0 <= i < len(shape) and shape[i].is_vision


def _delimiters(shape: Sequence[RunShape], run: int) -> int:
    return shape[run - 1].num_tokens + shape[run + 1].num_tokens


def _fill(shape: Sequence[RunShape], row_length: int) -> list[_Part]:
    """Parts filled to the row, one after another."""
    bos = _Stretch(0, 0, 1)
    parts: list[_Part] = [[bos]]
    used = 1
    for piece in _pieces(shape):
        at = 0
        size = piece.stop - piece.start if isinstance(piece, _Stretch) else len(piece.frames)
        while at < size:
            if isinstance(piece, _Stretch):
                count = min(size - at, row_length - used)
            else:
                count = min(size - at, (row_length - used - _delimiters(shape, piece.run)) // FRAME)
            if count > 0:
                if isinstance(piece, _Stretch):
                    taken: _Stretch | _Block = _Stretch(piece.run, piece.start + at, piece.start + at + count)
                else:
                    taken = _Block(piece.run, piece.frames[at : at + count])
                parts[-1].append(taken)
                used += taken.num_tokens(shape)
                at += count
            elif used == 1:
                raise ValueError(f"a frame of {FRAME} tokens and its delimiters do not fit a row of {row_length:,}")
            else:
                parts.append([bos])
                used = 1
    return parts


def _thin(shape: Sequence[RunShape], row_length: int) -> list[_Part]:
    """One part, with at most as many frames of each block as makes it fit; none where even one of each is too many."""
    pieces = _pieces(shape)
    blocks = [len(piece.frames) for piece in pieces if isinstance(piece, _Block)]
    text = sum(run.num_tokens for run in shape if not run.is_vision)
    room = (row_length - text) // FRAME
    if not blocks or room < len(blocks):
        return []
    most = bisect_right(range(room + 1), room, key=lambda most: sum(min(most, count) for count in blocks)) - 1
    thinned: _Part = [_Stretch(0, 0, 1)]
    for piece in pieces:
        if isinstance(piece, _Block) and len(piece.frames) > most:
            piece = _Block(piece.run, evenly(len(piece.frames), most))
        thinned.append(piece)
    return [thinned]
