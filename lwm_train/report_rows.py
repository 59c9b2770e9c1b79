"""Rows of a dataset as a person can see them: a strip of the whole row, and the pieces of its most telling places.

    strip     |----novels----|--talk: prompt (pale)--|answer|....|     one block a run, coloured by source
    weights    ______________                         -------          loss weight, in parts of the row's largest
    pieces    <s>  Call  me  Ish mael .  ...   ASSISTANT:  The  magic  num ber ...

The rows drawn are those that show most: first sources that no row before showed, then many segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import fsspec
import numpy as np
import pyarrow.parquet as pq

from lwm_data.format.dataset import Dataset
from lwm_data.format.packed import Arrays

ROWS = 3  # drawn of each dataset
HEAD = 150  # pieces shown from a row's beginning
BEFORE, AFTER = 40, 40  # pieces shown around the first answer after them


@dataclass(frozen=True)
class Block:
    """A run in the strip. start, width: percent of the row; colour: the number of its source, None in padding."""

    start: float
    width: float
    colour: int | None
    is_trained: bool
    is_vision: bool
    title: str


@dataclass(frozen=True)
class Piece:
    """One token. strength: 0 where it is not trained, else 25 to 75 by its weight; is_special: BOS, EOS, a code."""

    text: str
    colour: int | None
    strength: int
    is_special: bool
    title: str


@dataclass(frozen=True)
class DrawnRow:
    """stretches: (number of its first token, pieces); weight_path: SVG path in percent; borders: percent of the row."""

    dataset: str
    row: int
    length: int
    num_segments: int
    num_trained: int
    num_padding: int
    max_weight: float
    blocks: list[Block]
    borders: list[float]
    weight_path: str
    stretches: list[tuple[int, list[Piece]]]


def draw_rows(dataset: Dataset, colours: dict[str, int]) -> list[DrawnRow]:
    """ROWS rows of the dataset's first shard; `colours` numbers the sources."""
    parts = _parts_by_row(dataset)
    shown: set[str] = set()
    drawn = []
    for _ in range(min(ROWS, len(parts))):
        row = max(parts, key=lambda row: (len({name for name, _ in parts[row]} - shown), len(parts[row]), -row))
        names, lengths = zip(*parts.pop(row), strict=True)
        shown |= set(names)
        drawn.append(_draw(dataset, row, np.repeat(names, lengths).tolist(), colours))
    return drawn


def _parts_by_row(dataset: Dataset) -> dict[int, list[tuple[str, int]]]:
    """(source, tokens) of each example in turn, of every row of the first shard."""
    name = dataset.info.shards[0].name.removesuffix(".tar")
    with fsspec.open(f"{dataset.url}/{name}.examples.parquet", "rb") as file:
        table = pq.read_table(file, columns=["row", "source", "num_tokens"]).to_pydict()
    parts: dict[int, list[tuple[str, int]]] = {}
    for row, source, num_tokens in zip(table["row"], table["source"], table["num_tokens"], strict=True):
        parts.setdefault(row, []).append((source, num_tokens))
    return parts


def _draw(dataset: Dataset, row: int, sources: list[str], colours: dict[str, int]) -> DrawnRow:
    """`sources`: the source of every token that is not padding."""
    packed, arrays = dataset.packed(row), dataset[row]
    length = dataset.info.row_length
    max_weight = float(packed.weights.max())
    blocks, borders, path = [], [], []
    begin, before = 0, 0
    for (num, segment, vision), weight in zip(packed.runs.tolist(), packed.weights.tolist(), strict=True):
        if segment != before and begin:
            borders.append(_percent(begin, length))
        what = f"{sources[begin]}: segment {segment}" if segment else "padding"
        blocks.append(
            Block(
                start=_percent(begin, length),
                width=_percent(num, length),
                colour=colours[sources[begin]] if segment else None,
                is_trained=weight > 0,
                is_vision=bool(vision),
                title=f"{what}, tokens {begin:,} to {begin + num - 1:,}, loss weight {weight:.3g}",
            )
        )
        height = 100 - 100 * weight / max_weight if max_weight else 100.0
        path += [f"{_percent(begin, length)} {height:.1f}", f"{_percent(begin + num, length)} {height:.1f}"]
        begin, before = begin + num, segment
    segments, weights = arrays["segment_ids"], arrays["loss_weights"]
    return DrawnRow(
        dataset=dataset.info.name,
        row=row,
        length=length,
        num_segments=int(segments.max()),
        num_trained=int((weights > 0).sum()),
        num_padding=int((segments == 0).sum()),
        max_weight=max_weight,
        blocks=blocks,
        borders=borders,
        weight_path="M" + "L".join(path),
        stretches=[
            (start, _pieces(dataset, arrays, start, stop, [colours[name] for name in sources]))
            for start, stop in _stretches(weights, length - int((segments == 0).sum()))
        ],
    )


def _stretches(weights: np.ndarray, num_tokens: int) -> list[tuple[int, int]]:
    """The row's first tokens; and, where an answer begins further on, those around the first such place."""
    head = min(HEAD, num_tokens)
    begins = 1 + np.flatnonzero((weights[1:] > 0) & (weights[:-1] == 0))
    later = begins[begins >= head]
    if not len(later):
        return [(0, head)]
    start, stop = max(head, int(later[0]) - BEFORE), min(num_tokens, int(later[0]) + AFTER)
    return [(0, stop)] if start == head else [(0, head), (start, stop)]


def _pieces(dataset: Dataset, arrays: Arrays, start: int, stop: int, colour_of: list[int]) -> list[Piece]:
    tokenizer, max_weight = dataset.text_tokenizer, float(arrays["loss_weights"].max())
    pieces = []
    for at in range(start, stop):
        token, weight = int(arrays["tokens"][at]), float(arrays["loss_weights"][at])
        is_vision = bool(arrays["vision_mask"][at])
        text = str(token) if is_vision else tokenizer.pieces(np.array([token]))[0]
        pieces.append(
            Piece(
                text=text.replace("<0x0A>", "↵").replace("\n", "↵"),
                colour=colour_of[at],
                strength=round(25 + 50 * weight / max_weight) if weight else 0,
                is_special=is_vision or token in (tokenizer.bos, tokenizer.eos),
                title=f"{'code' if is_vision else 'id'} {token}, token {at:,}, loss weight {weight:.3g}",
            )
        )
    return pieces


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 3)
