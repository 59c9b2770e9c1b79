"""Rows of a dataset as a person can see them: a strip of the whole row, and the pieces of its most telling places.

    strip     |----novels----|--talk: prompt (pale)--|answer|=photos=|....|     one block a run, coloured by source
    weights    ______________                         -------________         loss weight, in parts of the row's largest
    pieces    <s>  Call  me  Ish mael .  ...   ASSISTANT:  The  magic  num ber ...  <vision> [picture] </vision>

The rows drawn are those that show most: first sources, pictures and videos that no row before showed, then many
segments. A block of vision is one piece, whatever its length.
"""

from __future__ import annotations

from dataclasses import dataclass

import fsspec
import numpy as np
import pyarrow.parquet as pq

from lwm_data.format.dataset import Dataset
from lwm_data.format.packed import Arrays
from lwm_data.format.vocab import CODES_PER_FRAME, EOF
from lwm_data.vision.page_pictures import Pictures
from lwm_data.vision.pictures import vision_blocks

ROWS = 3  # drawn of each dataset
HEAD = 150  # pieces shown from a row's beginning
BEFORE, AFTER = 40, 40  # pieces shown around the first answer, picture and video after them
SHARDS = 8  # looked at for rows


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
    """One token, or one block of vision. strength: 0 where it is not trained, else 25 to 75 by its weight.

    is_special: BOS, EOS, vision. picture: address of the vision's frames, where they are drawn.
    """

    text: str
    colour: int | None
    strength: int
    is_special: bool
    title: str
    picture: str | None = None


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

    @property
    def has_vision(self) -> bool:
        return any(block.is_vision for block in self.blocks)


@dataclass(frozen=True)
class _Part:
    """An example in a row."""

    source: str
    num_tokens: int
    num_vision: int

    @property
    def shows(self) -> set[tuple[str, str]]:
        """What a row with it has to show."""
        found = {("source", self.source)}
        if self.num_vision:
            found.add(("vision", "picture" if self.num_vision <= CODES_PER_FRAME + 1 else "video"))
        return found


def draw_rows(dataset: Dataset, colours: dict[str, int], pictures: Pictures) -> list[DrawnRow]:
    """ROWS rows of the dataset; `colours` numbers the sources, `pictures` draws vision."""
    parts = _parts_by_row(dataset)
    offers = {row: set().union(*(part.shows for part in parts[row])) for row in parts}
    shown: set[tuple[str, str]] = set()
    drawn = []
    for _ in range(min(ROWS, len(parts))):
        row = max(offers, key=lambda row: (len(offers[row] - shown), len(parts[row]), -row))
        shown |= offers.pop(row)
        sources = np.repeat([part.source for part in parts[row]], [part.num_tokens for part in parts[row]])
        drawn.append(_draw(dataset, row, sources.tolist(), colours, pictures))
    return drawn


def _parts_by_row(dataset: Dataset) -> dict[int, list[_Part]]:
    """The examples in turn of every row of the first shards, as many as it takes to have met every source."""
    unmet = {name for name, of in dataset.info.sources.items() if of.examples}
    parts: dict[int, list[_Part]] = {}
    first = 0
    for shard in dataset.info.shards[:SHARDS]:
        with fsspec.open(f"{dataset.url}/{shard.name.removesuffix('.tar')}.examples.parquet", "rb") as file:
            table = pq.read_table(file, columns=["row", "source", "num_tokens", "num_vision"]).to_pydict()
        for row, *part in zip(*table.values(), strict=True):
            parts.setdefault(first + row, []).append(_Part(*part))
        first += shard.num_rows
        unmet -= set(table["source"])
        if not unmet:
            break
    return parts


def _draw(dataset: Dataset, row: int, sources: list[str], colours: dict[str, int], pictures: Pictures) -> DrawnRow:
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
    vision = {start: stop for _, start, stop in vision_blocks(packed)}
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
            (start, _pieces(dataset, arrays, start, stop, vision, [colours[name] for name in sources], pictures))
            for start, stop in _stretches(weights, vision, len(sources))
        ],
    )


def _stretches(weights: np.ndarray, vision: dict[int, int], num_tokens: int) -> list[tuple[int, int]]:
    """The row's first pieces, and those around what comes first after them: an answer, a picture, a video."""

    def after(at: int, count: int) -> int:
        while count and at < num_tokens:
            at, count = vision.get(at, at + 1), count - 1
        return at

    def before(at: int, count: int) -> int:
        while count and at > 0:
            at, count = begins.get(at, at - 1), count - 1
        return at

    begins = {stop: start for start, stop in vision.items()}
    head = after(0, HEAD)
    answers = 1 + np.flatnonzero((weights[1:] > 0) & (weights[:-1] == 0))
    pictures = [start for start, stop in vision.items() if stop - start <= CODES_PER_FRAME + 1]
    videos = [start for start, stop in vision.items() if stop - start > CODES_PER_FRAME + 1]
    stretches = [(0, head)]
    telling = [next((int(at) for at in places if at >= head), None) for places in (answers, pictures, videos)]
    for at in sorted({at for at in telling if at is not None}):
        last_start, last_stop = stretches[-1]
        start = before(at, BEFORE)
        if start <= last_stop:
            stretches[-1] = (last_start, max(last_stop, after(at, AFTER)))
        else:
            stretches.append((start, after(at, AFTER)))
    return stretches


def _pieces(
    dataset: Dataset,
    arrays: Arrays,
    start: int,
    stop: int,
    vision: dict[int, int],
    colour_of: list[int],
    pictures: Pictures,
) -> list[Piece]:
    tokenizer, max_weight = dataset.text_tokenizer, float(arrays["loss_weights"].max())
    pieces = []
    at = start
    while at < stop:
        end = vision.get(at, at + 1)
        tokens, weight = arrays["tokens"][at:end], float(arrays["loss_weights"][end - 1])
        token, picture = int(tokens[0]), None
        if at in vision:
            num_frames = int((tokens >= EOF).sum())
            picture = pictures.picture(dataset, tokens)
            text = f"[vision {len(tokens):,} tokens: {num_frames:,} frame{'s' if num_frames != 1 else ''}]"
            what = f"{num_frames:,} frame{'s' if num_frames != 1 else ''}, tokens {at:,} to {end - 1:,}"
        else:
            text = _readable(tokenizer.pieces(tokens)[0])
            what = f"id {token}, token {at:,}"
        pieces.append(
            Piece(
                text=text,
                colour=colour_of[at],
                strength=round(25 + 50 * weight / max_weight) if weight else 0,
                is_special=at in vision or token in (tokenizer.bos, tokenizer.eos),
                title=f"{what}, loss weight {weight:.3g}",
                picture=picture,
            )
        )
        at = end
    return pieces


def _readable(piece: str) -> str:
    """The piece; one of a byte as its character, a line's end as a sign."""
    byte = int(piece[3:5], 16) if len(piece) == 6 and piece.startswith("<0x") else 0
    return (chr(byte) if 0x20 <= byte < 0x7F else "↵" if byte == 0x0A else piece).replace("\n", "↵")


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 3)
