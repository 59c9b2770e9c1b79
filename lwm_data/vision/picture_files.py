"""Frames to a file by its name's ending, and codes to and from files.

frames   uint8[n, 256, 256, 3]  ->  .png   one picture, or a strip of all
                                    .gif   animated
                                    .mp4   H.264
codes    int32[n, 256]         <->  .npy   as numpy writes it
                                    .json  a list of n lists
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
from jaxtyping import Int32, UInt8

from lwm_data.format.atomic import write_whole
from lwm_data.format.vocab import CODES_PER_FRAME, EOF
from lwm_data.vision.pictures import png_bytes, strip

MAX_CODES_FILE = 1 << 30  # bytes
MAX_STRIP = 65_000 // 256  # frames; most programs take no wider picture
FRAME_MS = 10  # a GIF's frames last hundredths of a second


def write_frames(frames: UInt8[np.ndarray, "n 256 256 3"], path: Path, fps: float) -> None:
    """Write `path` whole or not at all; `fps` is of moving pictures. ValueError for another ending."""
    if path.suffix.lower() not in WRITERS:
        raise ValueError(f"--out: got {path}; wanted a name that ends in {', '.join(WRITERS)}")
    if not fps > 0:
        raise ValueError(f"--fps: got {fps:g}; wanted more than 0")
    data = WRITERS[path.suffix.lower()](frames, fps)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data)


def _png(frames: UInt8[np.ndarray, "n side side 3"], fps: float) -> bytes:
    if len(frames) > MAX_STRIP:
        raise ValueError(f"{len(frames):,} frames in one .png; wanted at most {MAX_STRIP}; --out x.mp4 takes more")
    return png_bytes(strip(frames, height=frames.shape[1]))


def _gif(frames: UInt8[np.ndarray, "n side side 3"], fps: float) -> bytes:
    from PIL import Image

    first, *others = (Image.fromarray(frame) for frame in frames)
    file = io.BytesIO()
    duration = max(FRAME_MS, round(1000 / fps))
    first.save(file, "GIF", save_all=True, append_images=others, duration=duration, loop=0)
    return file.getvalue()


def _mp4(frames: UInt8[np.ndarray, "n side side 3"], fps: float) -> bytes:
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "bitexact"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width = stream.height = frames.shape[1]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # with more, the bytes depend on how many there are
        stream.codec_context.options = {"crf": "18"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


WRITERS: dict[str, Callable[[UInt8[np.ndarray, "n side side 3"], float], bytes]] = {
    ".png": _png,
    ".gif": _gif,
    ".mp4": _mp4,
}


def write_codes_file(codes: Int32[np.ndarray, "n 256"], path: Path) -> None:
    """Write `path`, .npy or .json, whole or not at all."""
    if path.suffix == ".json":
        data = json.dumps(codes.tolist()).encode() + b"\n"
    elif path.suffix == ".npy":
        file = io.BytesIO()
        np.save(file, codes.astype("<i4"), allow_pickle=False)
        data = file.getvalue()
    else:
        raise ValueError(f"--out: got {path}; wanted a name that ends in .npy or .json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data)


def read_codes_file(path: Path) -> Int32[np.ndarray, "n 256"]:
    """The codes in `path`. ValueError where it holds none, or what are none. Nothing in it is run."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; `lwm-data vision encode` writes one")
    if path.stat().st_size > MAX_CODES_FILE:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes; wanted at most {MAX_CODES_FILE:,}")
    try:
        is_json = path.suffix == ".json"
        # A map is as long as the file, whatever its header claims.
        codes = np.array(json.loads(path.read_bytes())) if is_json else np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OverflowError, OSError, RecursionError) as error:
        raise ValueError(f"{path}: not codes: {error}; wanted what `lwm-data vision encode` writes") from None
    if codes.dtype.kind not in "iu" or codes.ndim != 2 or codes.shape[1] != CODES_PER_FRAME or not len(codes):
        got = f"{codes.dtype}{list(codes.shape)}"
        raise ValueError(f"{path}: got {got}; wanted integers [frames, {CODES_PER_FRAME}], one or more frames")
    if codes.min() < 0 or codes.max() >= EOF:
        raise ValueError(f"{path}: got codes from {codes.min()} to {codes.max()}; wanted 0 to {EOF - 1}")
    return np.array(codes, np.int32)
