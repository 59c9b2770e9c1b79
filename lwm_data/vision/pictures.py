"""Vision tokens as pictures for a person to look at.

tokens          c0..c255 EOF  c0..c255 EOF  ...  c0..c255 EOV
whole_frames    int32[n, 256]              one that the row's border cut is left out
evenly          int32[m]                   the first, the last, and some between
decode_block    uint8[m, 256, 256, 3]
strip           uint8[height, width, 3]    side by side, on white; a second row of them below
file            PNG, or a JPEG in a data URI: the same bytes for the same pixels
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32, Int64, Integer, UInt8

from lwm_data.format.packed import PackedSequence
from lwm_data.format.vocab import CODES_PER_FRAME, EOF

if TYPE_CHECKING:
    from PIL import Image

    from lwm_data.vision.vqgan import VisionTokenizer

GAP = 48  # a strip's gaps are its height over this
JPEG_QUALITY = 85


def vision_blocks(row: PackedSequence) -> list[tuple[int, int, int]]:
    """(segment, first token, the one after the last) of each stretch of vision in the row, within one segment."""
    blocks: list[tuple[int, int, int]] = []
    begin = 0
    for num, segment, vision in row.runs.tolist():
        if vision:
            if blocks and blocks[-1][0] == segment and blocks[-1][2] == begin:
                begin_of_block = blocks.pop()[1]
            else:
                begin_of_block = begin
            blocks.append((segment, begin_of_block, begin + num))
        begin += num
    return blocks


def whole_frames(tokens: Integer[np.ndarray, " length"]) -> Int32[np.ndarray, "n 256"]:
    """The codes of the frames in a stretch of vision tokens, without EOF and EOV.

    A naive row may begin or end inside a frame; that one is left out. ValueError where any other has not 256 codes.
    """
    tokens = np.asarray(tokens, np.int32)
    ends = np.flatnonzero(tokens >= EOF)
    if len(tokens) and (not len(ends) or ends[-1] != len(tokens) - 1):
        ends = np.append(ends, len(tokens))  # cut before its end
    begins = np.concatenate([[0], ends + 1])[:-1]
    lengths = ends - begins
    is_whole = lengths == CODES_PER_FRAME
    may_be_cut = (begins == 0) | (ends == len(tokens))
    wrong = np.flatnonzero(~is_whole & ~(may_be_cut & (lengths < CODES_PER_FRAME)))
    if len(wrong) or (len(tokens) and tokens.min() < 0):
        got = int(lengths[wrong[0]]) if len(wrong) else int(tokens.min())
        raise ValueError(
            f"vision tokens: got {f'a frame of {got:,} codes' if len(wrong) else f'a code of {got}'}; wanted "
            f"{CODES_PER_FRAME} codes from 0 to {EOF - 1}, then EOF or EOV; `lwm-data check` tells where a dataset is "
            "damaged"
        )
    return tokens[begins[is_whole, np.newaxis] + np.arange(CODES_PER_FRAME)]


def evenly(num_frames: int, most: int) -> Int64[np.ndarray, " n"]:
    """At most `most` of the numbers 0, 1, ... num_frames - 1, ascending: the first, the last, evenly between."""
    if num_frames <= most:
        return np.arange(num_frames)
    return np.arange(most) * (num_frames - 1) // max(most - 1, 1)


def decode_block(
    tokens: Integer[np.ndarray, " length"], tokenizer: VisionTokenizer, most: int | None = None
) -> UInt8[np.ndarray, "n 256 256 3"]:
    """The frames in a stretch of vision tokens, `most` of them evenly chosen. ValueError as whole_frames and decode."""
    codes = whole_frames(tokens)
    return tokenizer.decode(codes if most is None else codes[evenly(len(codes), most)])


def strip(*rows: UInt8[np.ndarray, "n side side 3"], height: int) -> UInt8[np.ndarray, "pixels_down pixels_across 3"]:
    """Frames side by side, each `height` pixels high; further `rows` of them below, on white."""
    from PIL import Image

    gap = max(1, height // GAP)
    most = max(map(len, rows))
    if not most:
        raise ValueError("no frame to draw; wanted one or more")
    sheet = Image.new("RGB", ((height + gap) * most - gap, (height + gap) * len(rows) - gap), (255, 255, 255))
    for down, frames in enumerate(rows):
        for across, frame in enumerate(frames):
            sheet.paste(shrunk(frame, height), ((height + gap) * across, (height + gap) * down))
    return np.asarray(sheet)


def shrunk(frame: UInt8[np.ndarray, "side side 3"], side: int) -> Image.Image:
    """The frame at `side` x `side` pixels."""
    from PIL import Image

    image = Image.fromarray(frame)
    return image if image.size == (side, side) else image.resize((side, side), Image.Resampling.LANCZOS)


def png_bytes(picture: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """The picture as a PNG file."""
    return _file(picture, "PNG")


def data_uri(picture: UInt8[np.ndarray, "h w 3"]) -> str:
    """The picture as a JPEG within an address, for a page that loads nothing."""
    return f"data:image/jpeg;base64,{base64.b64encode(_file(picture, 'JPEG', quality=JPEG_QUALITY)).decode()}"


def _file(picture: UInt8[np.ndarray, "h w 3"], kind: str, **options: int) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind, **options)
    return file.getvalue()
