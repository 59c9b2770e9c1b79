"""PackedSequence: one row of a fixed length. The only code that turns runs into arrays.

    two examples, "ab|CD" (CD trained) and "e|F" (F trained), with BOS `^` and EOS `$`, in a row of 10:

    tokens         ^  a  b  C  D  $  ^  e  F  .
    runs           |-----|  |-----|  |--|  |  |     one weight each: 0, 1/3, 0, 1, 0 (loss_weighting: example)
    segment_ids    1  1  1  1  1  1  2  2  2  0     0 is padding
    position_ids   0  1  2  3  4  5  0  1  2  0     restart in each segment
    vision_mask    0  0  0  0  0  0  0  0  0  0
    loss_weights   0  0  0 1/3 1/3 1/3 0  0  1  0   of the token that is predicted

A segment's first token weighs 0 whatever its run says, since nothing predicts it. So a plain text, all of it trained
but its BOS, is one run:

    tokens         ^  a  b  C  D  $
    run            |--------------|                 its weight is 1/5
    loss_weights   0 1/5 1/5 1/5 1/5 1/5

Under `loss_weighting: example` the weights of one example sum to 1, so that sum(w * ce) / sum(w) over a packed
batch is the mean over examples of each example's mean loss: the paper's masked sequence packing (arXiv
2402.08268, section on masked packing). Under `token` every trained token weighs 1.

`packing: masked` puts whole examples in segments of their own. `packing: naive` is concatenate-and-cut, as the
release's loader does it: one segment a row, whatever is in it, cut anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, Integer, UInt, UInt32

from lwm_data.format.example import Example

BLOCK = 1 << 16  # tokens

LossWeighting = Literal["example", "token"]
Packing = Literal["masked", "naive"]


class Arrays(TypedDict):
    """A row, or a slice of one, as the trainer takes it; of several rows the arrays are [rows, length]."""

    tokens: Int32[np.ndarray, "... length"]
    vision_mask: Bool[np.ndarray, "... length"]
    segment_ids: Int32[np.ndarray, "... length"]
    position_ids: Int32[np.ndarray, "... length"]
    loss_weights: Float32[np.ndarray, "... length"]


@dataclass(frozen=True)
class Piece:
    """tokens start..stop of an example: all of them, unless a naive row cut it."""

    example: Example
    start: int
    stop: int


@dataclass(frozen=True)
class PackedSequence:
    """One row.

    tokens: of any integer dtype, 0 in padding.
    runs: uint32[n, 3]: length, segment, vision (0 or 1); the lengths sum to the row's; padding is a run of segment 0.
    weights: float32[n]: the loss weight of each token of the run, but for a segment's first token, which has 0.
    """

    tokens: np.ndarray
    runs: UInt32[np.ndarray, "n 3"]
    weights: Float32[np.ndarray, " n"]

    @property
    def trained_lengths(self) -> Int64[np.ndarray, " n"]:
        """Of each run, its tokens of loss weight above 0."""
        lengths, segments, _ = self.runs.astype(np.int64).T
        trained: np.ndarray = (lengths - (np.diff(segments, prepend=0) != 0)) * (self.weights > 0)
        return trained

    def arrays(self, start: int = 0, stop: int | None = None) -> Arrays:
        """The five arrays of tokens start..stop of the row."""
        tables = RunTables.of([(self.runs, self.weights)])
        return row_of(derive(self.tokens[np.newaxis, start:stop], tables, len(self.tokens), start), 0)


class RunTables(NamedTuple):
    """The runs of whole rows, one row after another: the next num_runs[i] of `runs` and `weights` are row i's."""

    runs: UInt[np.ndarray, "n 3"]
    weights: Float32[np.ndarray, " n"]
    num_runs: Int64[np.ndarray, " rows"]

    @staticmethod
    def of(rows: Sequence[tuple[UInt[np.ndarray, "n 3"], Float32[np.ndarray, " n"]]]) -> RunTables:
        """The tables of rows given as (runs, weights)."""
        runs, weights = zip(*rows, strict=True)
        return RunTables(np.concatenate(runs), np.concatenate(weights), np.array([len(of_row) for of_row in runs]))


def pack_row(pieces: Sequence[Piece], row_length: int, packing: Packing, weighting: LossWeighting) -> PackedSequence:
    """The row that holds `pieces` in turn, padded to `row_length` tokens."""
    tokens = np.zeros(row_length, np.int32)
    runs: list[tuple[int, int, int]] = []
    weights: list[float] = []
    at = 0
    for number, piece in enumerate(pieces, start=1):
        example = piece.example
        weight = 1.0 if weighting == "token" else 1.0 / max(1, example.num_trained)
        begin = 0
        for run in example.runs:
            part = run.tokens[max(0, piece.start - begin) : max(0, piece.stop - begin)]
            begin += len(run.tokens)
            if not len(part):
                continue
            tokens[at : at + len(part)] = part
            runs.append((len(part), number if packing == "masked" else 1, int(run.is_vision)))
            weights.append(weight if run.trained else 0.0)
            at += len(part)
    assert at <= row_length, f"{at} tokens in a row of {row_length}"
    if at < row_length:
        runs.append((row_length - at, 0, 0))
        weights.append(0.0)
    return PackedSequence(tokens, *merge_runs(np.array(runs, np.uint32), np.array(weights, np.float32)))


def merge_runs(
    runs: UInt32[np.ndarray, "n 3"], weights: Float32[np.ndarray, " n"]
) -> tuple[UInt32[np.ndarray, "m 3"], Float32[np.ndarray, " m"]]:
    """The fewest runs and weights that give a row the same arrays: neighbours that are alike become one.

    A run that is nothing but a segment's first token is like any other of its modality, as its weight says nothing.
    """
    continues = runs[1:, 1] == runs[:-1, 1]
    is_first_token = (runs[:-1, 0] == 1) & np.append(True, ~continues[:-1])
    alike = continues & (runs[1:, 2] == runs[:-1, 2]) & (is_first_token | (weights[1:] == weights[:-1]))
    begins = np.flatnonzero(np.append(True, ~alike))
    merged = runs[begins]
    merged[:, 0] = np.add.reduceat(runs[:, 0], begins)
    return merged, weights[np.append(begins[1:], len(runs)) - 1]


def derive(tokens: Integer[np.ndarray, "rows length"], tables: RunTables, row_length: int, start: int) -> Arrays:
    """The five arrays [rows, length] of the tokens start..start + length of the rows that `tables` describes.

    ValueError where the runs of a row do not cover its `row_length` tokens: the tables are damaged.
    """
    runs, weights, num_runs = tables
    shape, stop = tokens.shape, start + tokens.shape[1]
    firsts = np.cumsum(num_runs) - num_runs  # each row's first run
    ends = np.cumsum(runs[:, 0], dtype=np.int64)
    begins = ends - runs[:, 0]
    covered = np.diff(begins[firsts], append=ends[-1])
    if (covered != row_length).any():
        raise ValueError(f"runs cover {covered[covered != row_length][0]:,} tokens of a row of {row_length:,}")
    row_begins = np.repeat(begins[firsts], num_runs)
    begins, ends = begins - row_begins, ends - row_begins  # counted from the row's first token
    # A segment begins where its number changes or a row begins; positions count from there, and padding stays 0.
    segments = runs[:, 1].astype(np.int32)
    is_start = np.ones(len(runs), bool)
    np.not_equal(segments[1:], segments[:-1], out=is_start[1:])
    is_start[firsts] = True
    segment_begins = begins[np.maximum.accumulate(np.where(is_start, np.arange(len(runs)), 0))]
    inside = np.maximum(np.minimum(ends, stop) - np.maximum(begins, start), 0)  # tokens of each run
    position_ids = np.repeat((start - segment_begins).astype(np.int32), inside).reshape(shape)
    _count_on(position_ids)
    ends_inside = np.cumsum(inside)
    loss_weights = np.repeat(weights.astype(np.float32, copy=False), inside).reshape(shape)
    first_tokens = is_start & (begins >= start) & (inside > 0)
    loss_weights.reshape(-1)[(ends_inside - inside)[first_tokens]] = 0
    for run in np.flatnonzero(segments == 0).tolist():
        position_ids.reshape(-1)[ends_inside[run] - inside[run] : ends_inside[run]] = 0
    return Arrays(
        tokens=tokens.astype(np.int32, copy=False),
        vision_mask=np.repeat(runs[:, 2] != 0, inside).reshape(shape),
        segment_ids=np.repeat(segments, inside).reshape(shape),
        position_ids=position_ids,
        loss_weights=loss_weights,
    )


def _count_on(values: Int32[np.ndarray, "rows length"]) -> None:
    """Add 0, 1, 2, ... to each row, in blocks that stay in the processor's cache."""
    count = np.arange(min(BLOCK, values.shape[1]), dtype=np.int32)
    for begin in range(0, values.shape[1], BLOCK):
        block = values[:, begin : begin + BLOCK]
        block += count[: block.shape[1]]
        count += BLOCK


def row_of(arrays: Arrays, row: int) -> Arrays:
    """The arrays [length] of one of the rows of arrays [rows, length]; views, not copies."""
    return Arrays(
        tokens=arrays["tokens"][row],
        vision_mask=arrays["vision_mask"][row],
        segment_ids=arrays["segment_ids"][row],
        position_ids=arrays["position_ids"][row],
        loss_weights=arrays["loss_weights"][row],
    )
