"""Codes of pictures and videos as they lie in the token store: one Arrow IPC file per unit of input.

    codes-3f0c...-91ab....arrow     names: a fingerprint of (files, vision tokenizer, sampling), one of the filters

    key        caption     codes                  reason       detail
    a.tar/000  "A cat."    [17 4090 ... 231]      null         null          a picture: 256 codes; a video: n times 256
    a.tar/001  null        []                     "truncated"  "image ..."   not taken

Codes cost hours where the rest costs minutes. So they know nothing of text tokenizer, order or row length, and a build
with other filters takes what an earlier one has made of the same file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import UInt16

from lwm_data.format.vocab import CODES_PER_FRAME
from lwm_data.sources.record import Rejection
from lwm_data.whole_file import whole_file

BATCH_CODES = 1 << 22  # a batch is written once it has this many
BATCH_ITEMS = 1 << 13

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("codes", pa.large_list(pa.uint16()), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)


@dataclass(frozen=True)
class Coded:
    """The frames of a picture (one) or a video as codes, and its caption."""

    key: str
    caption: str
    codes: UInt16[np.ndarray, "frames 256"]


def write_codes(path: Path, items: Iterable[Coded | Rejection]) -> int:
    """Write `items` to `path`, whole or not at all; returns the number of frames."""
    num_frames = 0
    with whole_file(path) as file, pa.ipc.new_file(file, SCHEMA) as writer:
        batch: list[Coded | Rejection] = []
        num_codes = 0
        for item in items:
            batch.append(item)
            if isinstance(item, Coded):
                num_codes += item.codes.size
                num_frames += len(item.codes)
            if num_codes >= BATCH_CODES or len(batch) >= BATCH_ITEMS:
                writer.write_batch(_batch(batch))
                batch, num_codes = [], 0
        if batch:
            writer.write_batch(_batch(batch))
    return num_frames


def _batch(items: list[Coded | Rejection]) -> pa.RecordBatch:
    codes = [item.codes.reshape(-1) if isinstance(item, Coded) else np.zeros(0, np.uint16) for item in items]
    ends = np.cumsum([0, *map(len, codes)])
    values = pa.array(np.concatenate(codes).astype(np.uint16, copy=False))
    rejections = [item if isinstance(item, Rejection) else None for item in items]
    return pa.record_batch(
        [
            pa.array([item.key for item in items], pa.string()),
            pa.array([item.caption if isinstance(item, Coded) else None for item in items], pa.string()),
            pa.LargeListArray.from_arrays(ends, values),
            pa.array([r.reason if r else None for r in rejections], pa.string()),
            pa.array([r.detail if r else None for r in rejections], pa.string()),
        ],
        schema=SCHEMA,
    )


class CodeFile:
    """One file of codes, mapped. ValueError where it cannot be read."""

    def __init__(self, path: Path) -> None:
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path}: damaged file of codes ({error}); delete it and build again") from error

    def __iter__(self) -> Iterator[Coded | Rejection]:
        for number, batch in enumerate(self._batches):
            columns = (batch.column(name).to_pylist() for name in ("key", "caption", "reason", "detail"))
            for i, (key, caption, reason, detail) in enumerate(zip(*columns, strict=True)):
                if reason is None:
                    yield Coded(key, caption, self.codes((number, i)))
                else:
                    yield Rejection(key, reason, detail)

    def places(self) -> dict[str, tuple[int, int]]:
        """Where the codes of each key lie, for `codes`; rejections have none."""
        found: dict[str, tuple[int, int]] = {}
        for number, batch in enumerate(self._batches):
            taken = batch.column("reason").is_null().to_pylist()
            keys = batch.column("key").to_pylist()
            found |= {key: (number, i) for i, (key, is_taken) in enumerate(zip(keys, taken, strict=True)) if is_taken}
        return found

    def codes(self, place: tuple[int, int]) -> UInt16[np.ndarray, "frames 256"]:
        """The codes at one of `places`, as a view of the map."""
        batch, i = self._batches[place[0]], place[1]
        column = batch.column("codes")
        start, stop = column.offsets[i].as_py(), column.offsets[i + 1].as_py()
        return np.asarray(column.values[start:stop]).reshape(-1, CODES_PER_FRAME)
