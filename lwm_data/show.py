"""One row as a person, or a script, can read it.

segment 2   novels   moby_dick.txt   part 7   512 tokens, 511 trained
<s> Call me Ishmael. Some years ago ... </s>       trained text green, prompts dim, special ids yellow
"""

from __future__ import annotations

from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
from rich.console import Group
from rich.text import Text

from lwm_data.format.dataset import Dataset
from lwm_data.format.vocab import TextTokenizer
from lwm_data.summary import visible
from lwm_data.work_folder import examples_name


def row_view(dataset: Dataset, row: int) -> dict[str, Any]:
    """Row `row` as JSON: its examples in turn, each with its runs; a run has text (or vision) and a weight."""
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
            text = f"[vision {len(ids)} tokens]" if is_vision else _text(dataset.text_tokenizer, ids)
            weight = float(packed.weights[run])
            runs.append({"num_tokens": len(ids), "vision": is_vision, "weight": weight, "text": text})
        segments.append({name: line[name] for name in line if name != "row"} | {"runs": runs})
        begin = end
    length = dataset.info.row_length
    return {"row": row, "shard": shard, "row_length": length, "padding": length - begin, "segments": segments}


def row_text(view: dict[str, Any]) -> Group:
    """The view of a row, for a terminal."""
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
        parts.append(text)
    parts.append(Text(f"\npadding: {view['padding']:,} tokens", style="bold"))
    return Group(*parts)


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
