"""PackedSequence: one row of a fixed length. The only code that turns runs into arrays.

    two examples, "ab|CD" (CD trained) and "e|F" (F trained), with BOS `^` and EOS `$`, in a row of 10:

    tokens         ^  a  b  C  D  $  ^  e  F  .
    runs           ------0  ------1  ---0  -2 -0    one weight each: 0, 1/3, 0, 1, 0 (loss_weighting: example)
    segment_ids    1  1  1  1  1  1  2  2  2  0     0 is padding
    position_ids   0  1  2  3  4  5  0  1  2  0     restart in each segment
    vision_mask    0  0  0  0  0  0  0  0  0  0
    loss_weights   0  0  0 1/3 1/3 1/3 0  0  1  0   of the token that is predicted, never of a segment's first

Under `loss_weighting: example` the weights of one example sum to 1, so that sum(w * ce) / sum(w) over a packed
batch is the mean over examples of each example's mean loss: the paper's masked sequence packing (arXiv
2402.08268, section on masked packing). Under `token` every trained token weighs 1.

`packing: masked` puts whole examples in segments of their own. `packing: naive` is concatenate-and-cut, as the
release's loader does it: one segment a row, whatever is in it, cut anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt32

from lwm_data.format.example import Example

LossWeighting = Literal["example", "token"]
Packing = Literal["masked", "naive"]


class Arrays(TypedDict):
    """A row, or a slice of one, as the trainer takes it; every array has the slice's length."""

    tokens: Int32[np.ndarray, " length"]
    vision_mask: Bool[np.ndarray, " length"]
    segment_ids: Int32[np.ndarray, " length"]
    position_ids: Int32[np.ndarray, " length"]
    loss_weights: Float32[np.ndarray, " length"]


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
    weights: float32[n]: the loss weight of each token of the run.
    """

    tokens: np.ndarray
    runs: UInt32[np.ndarray, "n 3"]
    weights: Float32[np.ndarray, " n"]

    def arrays(self, start: int = 0, stop: int | None = None) -> Arrays:
        """The five arrays of tokens start..stop of the row."""
        stop = len(self.tokens) if stop is None else stop
        return derive(self.tokens[start:stop], self.runs, self.weights, start)


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
            segment = number if packing == "masked" else 1
            tokens[at : at + len(part)] = part
            if at == 0 and run.trained:  # a naive row can begin inside an example; nothing predicts its first token
                runs.append((1, segment, int(run.is_vision)))
                weights.append(0.0)
                part = part[1:]
                at += 1
            if len(part):
                runs.append((len(part), segment, int(run.is_vision)))
                weights.append(weight if run.trained else 0.0)
            at += len(part)
    assert at <= row_length, f"{at} tokens in a row of {row_length}"
    if at < row_length:
        runs.append((row_length - at, 0, 0))
        weights.append(0.0)
    return PackedSequence(tokens, np.array(runs, np.uint32).reshape(-1, 3), np.array(weights, np.float32))


def derive(
    tokens: np.ndarray, runs: UInt32[np.ndarray, "n 3"], weights: Float32[np.ndarray, " n"], start: int
) -> Arrays:
    """The five arrays of the tokens start..start + len(tokens) of the row that `runs` and `weights` describe."""
    stop = start + len(tokens)
    ends = np.cumsum(runs[:, 0], dtype=np.int64)
    begins = ends - runs[:, 0]
    first = int(np.searchsorted(ends, start, side="right"))
    last = int(np.searchsorted(begins, stop, side="left"))
    inside = slice(first, last)
    lengths = np.minimum(ends[inside], stop) - np.maximum(begins[inside], start)
    segments = runs[:, 1].astype(np.int32)
    # A segment begins where its number changes; positions count from there, and padding stays 0.
    is_start = np.r_[True, segments[1:] != segments[:-1]] if len(segments) else np.zeros(0, bool)
    segment_begins = np.maximum.accumulate(np.where(is_start, begins, 0))
    segment_ids = np.repeat(segments[inside], lengths)
    position_ids = np.arange(start, stop) - np.repeat(segment_begins[inside], lengths)
    position_ids[segment_ids == 0] = 0
    return Arrays(
        tokens=np.asarray(tokens, np.int32),
        vision_mask=np.repeat(runs[inside, 2] != 0, lengths),
        segment_ids=segment_ids,
        position_ids=position_ids.astype(np.int32),
        loss_weights=np.repeat(np.asarray(weights[inside], np.float32), lengths),
    )
