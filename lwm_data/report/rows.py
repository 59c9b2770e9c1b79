"""Random rows of a dataset as a page shows them: a strip of the whole row, then its segments with their text.

    strip      |----novels----|--talk: prompt (pale)--|answer|=photos=|....|     a block a run, coloured by source
    weights     ______________                         -------________          loss weight, of the row's largest
    segment 2  talk   00b1...   part 0    512 tokens, 60 trained
               USER: What is ... ASSISTANT: It is ...       untrained text dim, trained text tinted by its weight

Which rows: a function of the seed and the number of rows. How much of them: TEXT characters, RUNS runs and as many
pictures as `Pictures` draws, in the whole page; what is left out is counted in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lwm_data.format.dataset import Dataset
from lwm_data.report.evidence import ShownPair, marked
from lwm_data.report.page_text import CutText, cut_text, shown
from lwm_data.show import row_view
from lwm_data.sources.qa import asked_of
from lwm_data.summary import visible
from lwm_data.vision.page_pictures import Pictures
from lwm_data.vision.pictures import vision_blocks

TEXT, ROW_TEXT, RUN_TEXT = 600_000, 24_000, 6_000  # characters of a page, a row, a run
RUNS, ROW_RUNS = 8_000, 600
BLOCKS = 500  # of a strip; a row of more runs is drawn as it would look from afar
MAX_ROWS = 500
PAIRS = 12  # of a segment
EVIDENCE, QUESTION = 6_000, 400  # characters
CONTEXT = 60  # tokens


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
class ShownRun:
    """strength: 0 where it is not trained, else 14 to 36 percent by its weight. picture: address of some of its frames."""

    text: CutText
    strength: int
    is_vision: bool
    title: str
    picture: str | None


@dataclass(frozen=True)
class ShownSegment:
    """An example, or a piece of one. num_left_out: runs beyond those shown. pairs: what a `qa` example asks."""

    source: str
    colour: int
    key: str
    heading: str
    runs: list[ShownRun]
    num_left_out: int
    pairs: list[ShownPair]
    num_pairs_left_out: int


@dataclass(frozen=True)
class ShownRow:
    """weight_path: SVG path in percent; borders: percent of the row. problem: why it cannot be shown, else empty."""

    row: int
    shard: str
    heading: str
    blocks: list[Block]
    borders: list[float]
    weight_path: str
    segments: list[ShownSegment]
    num_left_out: int = 0
    problem: str = ""


def sample_rows(dataset: Dataset, num_rows: int, seed: int) -> list[int]:
    """`num_rows` numbers of rows or fewer, ascending: a function of the seed and the dataset's size."""
    random = np.random.default_rng(seed)
    return sorted(random.choice(len(dataset), min(num_rows, len(dataset)), replace=False).tolist())


def draw_row(dataset: Dataset, row: int, num_rows: int, pictures: Pictures) -> ShownRow:
    """Row `row`, of a page that shows `num_rows`."""
    try:
        view = row_view(dataset, row)
        packed = dataset.packed(row)
    except (ValueError, IndexError) as error:  # the page is of use all the same
        return ShownRow(row, "", "", [], [], "", [], problem=shown(str(error), 400))
    vision = {start: packed.tokens[start:stop] for _, start, stop in vision_blocks(packed)}
    colours = {name: number for number, name in enumerate(dataset.info.sources)}
    runs = [(segment, run) for segment in view["segments"] for run in segment["runs"]]
    most_weight = max((run["weight"] for _, run in runs), default=0.0)
    left_text = min(ROW_TEXT, TEXT // num_rows)
    left_runs = min(ROW_RUNS, RUNS // num_rows)
    segments = []
    for segment in view["segments"]:
        if left_text <= 0 or left_runs <= 0:
            break
        of_segment = []
        for run in segment["runs"][:left_runs]:
            if left_text <= 0:
                break
            picture = pictures.picture(dataset, vision[run["start"]]) if run["start"] in vision else None
            of_segment.append(_run(run, most_weight, min(RUN_TEXT, left_text), picture))
            left_text -= min(len(run["text"]), RUN_TEXT)
        left_runs -= len(of_segment)
        pairs = _pairs(dataset, segment, packed.tokens, left_text)
        left_text -= sum(len(text) for pair in pairs for text, _ in pair.parts)
        vision_note = f", {segment['num_vision']:,} vision" if segment["num_vision"] else ""
        segments.append(
            ShownSegment(
                source=shown(segment["source"]),
                colour=colours[segment["source"]],
                key=shown(segment["key"]),
                heading=f"segment {segment['segment']}, part {segment['part']}: {segment['num_tokens']:,} "
                f"tokens{vision_note}, {segment['num_trained']:,} trained",
                runs=of_segment,
                num_left_out=len(segment["runs"]) - len(of_segment),
                pairs=pairs,
                num_pairs_left_out=len(asked_of(segment["key"])) - len(pairs),
            )
        )
    num_trained = sum(segment["num_trained"] for segment in view["segments"])
    num = len(view["segments"])
    return ShownRow(
        row=row,
        shard=view["shard"],
        heading=f"{view['shard']} · {num:,} segment{'s' if num != 1 else ''}, {num_trained:,} of "
        f"{view['row_length']:,} tokens trained, {view['padding']:,} padding; largest weight {most_weight:.3g}",
        blocks=_blocks(runs, colours, view["row_length"], view["padding"]),
        borders=_borders(view),
        weight_path=_weight_path([run for _, run in runs], view["row_length"], most_weight),
        segments=segments,
        num_left_out=num - len(segments),
    )


def _pairs(dataset: Dataset, segment: dict[str, Any], tokens: np.ndarray, left_text: int) -> list[ShownPair]:
    """Some of the questions of a `qa` example, beside their evidence, of no more than `left_text` characters."""
    if dataset.info.packing == "naive":  # a piece does not say where in its example it begins
        return []
    runs = segment["runs"]
    answers = [number for number in range(1, len(runs)) if runs[number]["weight"] and not runs[number - 1]["weight"]]
    begin, tokenizer = runs[0]["start"], dataset.text_tokenizer
    end = begin + segment["num_tokens"]
    pairs: list[ShownPair] = []
    for number, (asked, run) in enumerate(zip(asked_of(segment["key"])[:PAIRS], answers, strict=False), start=1):
        start, stop = begin + asked.start, begin + asked.stop
        if not begin <= start < stop <= end or left_text <= 0:
            break
        before, chunk, after = (
            tokenizer.decode(tokens[max(begin, first) : min(end, last)].astype(np.int32))
            for first, last in ((start - CONTEXT, start), (start, stop), (stop, stop + CONTEXT))
        )
        question = runs[run - 1]["text"].removeprefix("USER:")
        question = "…" * (len(question) > QUESTION) + question[-QUESTION:]
        answer = runs[run]["text"][:QUESTION].removesuffix("</s>").strip()
        most = min(EVIDENCE, left_text)
        pairs.append(
            ShownPair(
                question=visible(question.strip(), kept="\n\t"),
                answer=visible(answer, kept="\n\t"),
                book=f"question {number}",
                place=f"depth {asked.depth:.0%}, evidence of {asked.stop - asked.start:,} tokens from {asked.start:,} on",
                before=visible(before, kept="\n\t"),
                parts=marked(visible(chunk[:most], kept="\n\t"), answer),
                after=visible(after, kept="\n\t") if len(chunk) <= most else "…",
            )
        )
        left_text -= min(len(chunk), most)
    return pairs


def _run(run: dict[str, Any], most_weight: float, most: int, picture: str | None) -> ShownRun:
    last = run["start"] + run["num_tokens"] - 1
    return ShownRun(
        text=cut_text(run["text"], most),
        strength=round(14 + 22 * run["weight"] / most_weight) if run["weight"] else 0,
        is_vision=run["vision"],
        title=f"tokens {run['start']:,} to {last:,}, loss weight {run['weight']:.3g}",
        picture=picture,
    )


def _blocks(
    runs: list[tuple[dict[str, Any], dict[str, Any]]], colours: dict[str, int], length: int, padding: int
) -> list[Block]:
    """Of each run; of more than BLOCKS those that the middles of so many equal parts of the row fall in."""
    edges = [(run["start"], run["start"] + run["num_tokens"]) for _, run in runs]
    if len(runs) > BLOCKS:
        middles = (np.arange(BLOCKS) + 0.5) * (length - padding) / BLOCKS
        chosen = np.searchsorted([stop for _, stop in edges], middles, side="right").tolist()
        edges = [(i * (length - padding) / BLOCKS, (i + 1) * (length - padding) / BLOCKS) for i in range(BLOCKS)]
        runs = [runs[number] for number in chosen]
    blocks = [
        Block(
            start=_percent(start, length),
            width=_percent(stop - start, length),
            colour=colours[segment["source"]],
            is_trained=run["weight"] > 0,
            is_vision=run["vision"],
            title=f"{shown(segment['source'])}: segment {segment['segment']}, tokens {run['start']:,} to "
            f"{run['start'] + run['num_tokens'] - 1:,}, loss weight {run['weight']:.3g}",
        )
        for (segment, run), (start, stop) in zip(runs, edges, strict=True)
    ]
    if padding:
        begin = length - padding
        title = f"padding: {padding:,} tokens"
        blocks.append(Block(_percent(begin, length), _percent(padding, length), None, False, False, title))
    return blocks


def _borders(view: dict[str, Any]) -> list[float]:
    begins = [segment["runs"][0]["start"] for segment in view["segments"] if segment["runs"]]
    if len(begins) > BLOCKS // 2:  # there would be nothing but borders
        return []
    return [_percent(begin, view["row_length"]) for begin in begins[1:]]


def _weight_path(runs: list[dict[str, Any]], length: int, most_weight: float) -> str:
    every = -(-len(runs) // BLOCKS)
    path = []
    for run in runs[:: max(every, 1)]:
        height = 100 - 100 * run["weight"] / most_weight if most_weight else 100.0
        stop = run["start"] + run["num_tokens"]
        path += [f"{_percent(run['start'], length)} {height:.1f}", f"{_percent(stop, length)} {height:.1f}"]
    return "M" + "L".join(path) if path else ""


def _percent(part: float, whole: int) -> float:
    return round(100 * part / whole, 3)
