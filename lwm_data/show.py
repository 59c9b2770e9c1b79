"""One row as a person, or a script, can see it.

segment 2   photos   00000.tar/000000007   part 0   290 tokens, 257 vision, 289 trained
<s> A cat on a mat. <vision>
[vision 257 tokens: 1 frame]       in a pipe; a terminal of colours shows the picture in half blocks: ▀ is two pixels
</vision></s>                      trained text green, prompts dim
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
from jaxtyping import UInt8
from rich.color import Color
from rich.console import Console, Group
from rich.style import Style
from rich.text import Text

from lwm_data.format.atomic import write_whole
from lwm_data.format.dataset import Dataset
from lwm_data.format.vocab import EOF, TextTokenizer
from lwm_data.summary import visible
from lwm_data.vision.dataset_tokenizer import dataset_vision_tokenizer
from lwm_data.vision.pictures import decode_block, png_bytes, shrunk, strip, vision_blocks
from lwm_data.work_folder import examples_name

FRAME_COLUMNS = 32  # of a frame in a terminal; a character is two pixels high
PNG_HEIGHT = 256  # pixels
PNG_FRAMES = 16  # of a video, in its strip
HINT = "Vision is drawn in a terminal of colours, and written to files by --png FOLDER."


def row_view(dataset: Dataset, row: int) -> dict[str, Any]:
    """Row `row` as JSON: its examples in turn, each with its runs; a run has text (or vision) and a weight.

    start: the run's first token in the row. num_frames: of a run of vision, those that end in it.
    """
    shard, row_in_shard = _shard_of(dataset, row)
    packed = dataset.packed(row)
    with fsspec.open(f"{dataset.url}/{examples_name(shard)}", "rb") as file:
        lines = pq.read_table(file, filters=[("row", "==", row_in_shard)]).to_pylist()
    ends = np.cumsum(packed.runs[:, 0], dtype=np.int64)
    segments = []
    begin = 0
    for line in lines:
        end = begin + line["num_tokens"]
        runs = []
        for run in range(int(np.searchsorted(ends, begin, side="right")), len(ends)):
            start, stop = max(begin, int(ends[run] - packed.runs[run, 0])), min(end, int(ends[run]))
            if start >= end:
                break
            is_vision = bool(packed.runs[run, 2])
            ids = packed.tokens[start:stop].astype(np.int32)
            view: dict[str, Any] = {
                "start": start,
                "num_tokens": len(ids),
                "vision": is_vision,
                "weight": float(packed.weights[run]),
            }
            if is_vision:
                num_frames = int((ids >= EOF).sum())
                view |= {"num_frames": num_frames, "text": _placeholder(len(ids), num_frames)}
            else:
                view["text"] = _text(dataset.text_tokenizer, ids)
            runs.append(view)
        segments.append({name: line[name] for name in line if name != "row"} | {"runs": runs})
        begin = end
    length = dataset.info.row_length
    return {"row": row, "shard": shard, "row_length": length, "padding": length - begin, "segments": segments}


def row_text(view: Mapping[str, Any], pictures: Mapping[int, Text] | None = None, note: str = "") -> Group:
    """The view of a row, for a terminal. pictures: what stands for a run of vision, by its first token."""
    pictures = pictures or {}
    parts = [Text(f"row {view['row']} of {view['shard']}: {view['row_length']:,} tokens", style="bold")]
    for segment in view["segments"]:
        vision = f", {segment['num_vision']:,} vision" if segment["num_vision"] else ""
        heading = (
            f"segment {segment['segment']}   {segment['source']}   {segment['key']}   part {segment['part']}   "
            f"{segment['num_tokens']:,} tokens{vision}, {segment['num_trained']:,} trained"
        )
        parts.append(Text("\n" + visible(heading), style="bold cyan"))
        text = Text()
        for run in segment["runs"]:
            style = "magenta" if run["vision"] else "green" if run["weight"] else "dim"
            text.append(visible(run["text"].replace("\r\n", "\n"), kept="\n\t"), style)
            if run["start"] in pictures:
                parts += [text, pictures[run["start"]]]
                text = Text()
        parts.append(text)
    parts.append(Text(f"\npadding: {view['padding']:,} tokens", style="bold"))
    if note:
        parts.append(Text(visible(note), style="dim"))
    return Group(*parts)


def print_row(dataset: Dataset, row: int, console: Console) -> None:
    """Print row `row`, with its vision as pictures where the console has colours and the dataset its tokenizer."""
    view = row_view(dataset, row)
    pictures: dict[int, Text] = {}
    note = ""
    if any(run["vision"] for segment in view["segments"] for run in segment["runs"]):
        if not console.is_terminal or console.color_system is None or console.no_color:
            note = HINT
        else:
            try:
                across = max(1, (console.width + 1) // (FRAME_COLUMNS + 1))
                pictures = {start: half_blocks(frames) for _, start, frames in _pictures(dataset, row, across)}
            except ValueError as error:  # the row is there all the same
                note = f"Vision is not drawn: {error}"
    console.print(row_text(view, pictures, note))


def write_pngs(dataset: Dataset, row: int, folder: Path) -> list[Path]:
    """Write each block of vision of row `row` to `folder`: row000005-segment01.png, then row000005-segment01-2.png.

    A video becomes a strip of PNG_FRAMES frames or fewer. ValueError where the dataset's codes cannot be decoded.
    """
    paths: list[Path] = []
    num_of: Counter[int] = Counter()
    for segment, _, frames in _pictures(dataset, row, PNG_FRAMES):
        num_of[segment] += 1
        number = f"-{num_of[segment]}" if num_of[segment] > 1 else ""
        paths.append(folder / f"row{row:06d}-segment{segment:02d}{number}.png")
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(paths[-1], png_bytes(strip(frames, height=PNG_HEIGHT)))
    return paths


def half_blocks(frames: UInt8[np.ndarray, "n side side 3"]) -> Text:
    """Frames side by side, FRAME_COLUMNS wide; the sign's colour is the upper pixel, the ground's the lower."""
    tiles = [np.asarray(shrunk(frame, FRAME_COLUMNS)).tolist() for frame in frames]
    lines = []
    for y in range(0, FRAME_COLUMNS, 2):
        lines.append(Text(no_wrap=True, overflow="crop"))
        for number, tile in enumerate(tiles):
            lines[-1].append(" " * bool(number))
            for upper, lower in zip(tile[y], tile[y + 1], strict=True):
                lines[-1].append("\u2580", Style(color=Color.from_rgb(*upper), bgcolor=Color.from_rgb(*lower)))
    return Text("\n", no_wrap=True, overflow="crop").join(lines)


def _pictures(dataset: Dataset, row: int, most: int) -> Iterator[tuple[int, int, UInt8[np.ndarray, "n side side 3"]]]:
    """(segment, first token, `most` frames or fewer) of each block of vision that has a whole frame."""
    packed = dataset.packed(row)
    blocks = vision_blocks(packed)
    if not blocks:
        return
    tokenizer = dataset_vision_tokenizer(dataset)
    if tokenizer is None:
        why = "names none" if dataset.info.vision_tokenizer_fingerprint is None else "lacks its file"
        raise ValueError(f"{dataset.url}: codes need the vision tokenizer that they were made with; the dataset {why}")
    for segment, start, stop in blocks:
        frames = decode_block(packed.tokens[start:stop], tokenizer, most)
        if len(frames):
            yield segment, start, frames


def _placeholder(num_tokens: int, num_frames: int) -> str:
    return f"[vision {num_tokens:,} tokens: {num_frames:,} frame{'s' if num_frames != 1 else ''}]"


def _shard_of(dataset: Dataset, row: int) -> tuple[str, int]:
    """The name of the row's shard, and its number in it."""
    for shard in dataset.info.shards:
        if row < shard.num_rows:
            return shard.name, row
        row -= shard.num_rows
    raise IndexError(f"{dataset.url}: row {row} is beyond its last")


def _text(tokenizer: TextTokenizer, ids: np.ndarray) -> str:
    """The text of `ids` with BOS as <s> and EOS as </s>, and the blank before a word that decoding takes off."""
    names = {tokenizer.bos: "<s>", tokenizer.eos: "</s>"}
    cuts = np.flatnonzero((ids == tokenizer.bos) | (ids == tokenizer.eos)).tolist()
    text = ""
    begin = 0
    for cut in [*cuts, len(ids)]:
        stretch = ids[begin:cut]
        if len(stretch):
            text += " " * tokenizer.pieces(stretch[:1])[0].startswith(" ") + tokenizer.decode(stretch)
        if cut < len(ids):
            text += names[int(ids[cut])]
        begin = cut + 1
    return text
