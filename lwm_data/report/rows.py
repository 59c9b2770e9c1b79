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
from lwm_data.report.asked import asked_pairs
from lwm_data.report.evidence import ShownPair
from lwm_data.report.page_text import CutText, cut_text, shown
from lwm_data.report.strip import Block, blocks, borders, weight_path
from lwm_data.show import row_view
from lwm_data.sources.qa import asked_of
from lwm_data.vision.page_pictures import Pictures
from lwm_data.vision.pictures import vision_blocks

TEXT, ROW_TEXT, RUN_TEXT = 600_000, 24_000, 6_000  # characters of a page, a row, a run
RUNS, ROW_RUNS = 4_000, 500  # the blocks of its strip, too
MAX_ROWS = 500


@dataclass(frozen=True)
class ShownRun:
    """strength: 0 where it is not trained, else 14 to 36 by its weight. picture: address of some of its frames."""

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
    left_runs = most_runs = min(ROW_RUNS, RUNS // num_rows)
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
        pairs = asked_pairs(dataset, segment, packed.tokens, left_text)
        left_text -= sum(len(text) for pair in pairs for text, _ in pair.parts)
        vision_note = f", {segment['num_vision']:,} vision" if segment["num_vision"] else ""
        segments.append(
            ShownSegment(
                source=shown(segment["source"]),
                colour=colours[segment["source"]],
                key=shown(segment["key"], 100),
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
        blocks=blocks(runs, colours, view["row_length"], view["padding"], most_runs),
        borders=borders(view, most_runs),
        weight_path=weight_path([run for _, run in runs], view["row_length"], most_weight, most_runs),
        segments=segments,
        num_left_out=num - len(segments),
    )


def _run(run: dict[str, Any], most_weight: float, most: int, picture: str | None) -> ShownRun:
    last = run["start"] + run["num_tokens"] - 1
    return ShownRun(
        text=cut_text(run["text"], most),
        strength=round(14 + 22 * run["weight"] / most_weight) if run["weight"] else 0,
        is_vision=run["vision"],
        title=f"tokens {run['start']:,} to {last:,}, loss weight {run['weight']:.3g}",
        picture=picture,
    )
