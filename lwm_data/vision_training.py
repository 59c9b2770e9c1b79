"""Pictures to train a vision tokenizer on: all frames of pictures and clips, in tars or as files, in memory.

photos/*.tar     000000007.jpg  .txt  .json  ...   \\   each file in turn   \\  kept out: every so many-th file
clips/*.mp4                                         >  to frames            >  trained on: the others
faces/*.png                                        /   by DecodePool       /

Captions are not needed, so a file that a source of a dataset rejects for its caption counts here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from lwm_data.sources.files import InputFile, find_files, open_unpacked
from lwm_data.sources.images import PICTURE
from lwm_data.sources.media_units import suffix
from lwm_data.sources.samples import Kind
from lwm_data.sources.tar_members import DamagedTar, read_members
from lwm_data.sources.videos import VIDEO
from lwm_data.vision.decode_pool import DecodePool, Failure, ImageRequest, VideoRequest
from lwm_data.vision.square import FRAME

MAX_FRAMES = 40_000  # 192 KiB each: 7.5 GiB
DECODERS = 2  # processes


@dataclass(frozen=True)
class TrainingFrames:
    """Frames to train on, frames of the files that are kept out, and why other files gave none (reason -> files)."""

    trained: UInt8[np.ndarray, "n 256 256 3"]
    kept_out: UInt8[np.ndarray, "m 256 256 3"]
    rejected: Counter[str]


def read_training_frames(patterns: Sequence[str], fps: float, max_frames: int, keep_out: int) -> TrainingFrames:
    """The frames of the files of the globs `patterns`; of a clip `fps` a second, at most `max_frames`.

    keep_out: every so many-th file is kept out of training, as a whole; 0: none. The same files give the same frames.
    ValueError where there are no frames, or more than MAX_FRAMES.
    """
    files = [file for pattern in patterns for file in find_files(pattern, "FILES")]
    rejected: Counter[str] = Counter()
    found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    chunks: list[np.ndarray] = []  # of the file that is being decoded
    num_files = num_frames = 0
    with DecodePool(DECODERS) as pool:
        for result in pool.decode(_requests(files, fps, max_frames, rejected)):
            if isinstance(result, Failure):
                rejected[result.reason] += 1
                chunks = []
                continue
            chunks.append(result.frames)
            if result.last:
                num_files += 1
                is_kept_out = keep_out > 0 and num_files % keep_out == 0
                found[is_kept_out].extend(chunks)
                num_frames += sum(map(len, chunks))
                chunks = []
                if num_frames > MAX_FRAMES:
                    raise ValueError(
                        f"FILES: more than {MAX_FRAMES:,} frames; a tokenizer is trained in memory: give fewer files, "
                        "or lower --fps or --max-frames"
                    )
    if not found[0]:
        why = ", ".join(f"{reason} {count:,}" for reason, count in sorted(rejected.items())) or "no pictures or clips"
        kept = f", and all {num_files} others are kept out" if num_files else ""
        raise ValueError(f"FILES: {len(files):,} files without a frame to train on: {why}{kept}")
    nothing = np.zeros((0, FRAME, FRAME, 3), np.uint8)
    return TrainingFrames(np.concatenate(found[0]), np.concatenate([nothing, *found[1]]), rejected)


def _requests(
    files: Sequence[InputFile], fps: float, max_frames: int, rejected: Counter[str]
) -> Iterator[ImageRequest | VideoRequest]:
    for file in files:
        kind = suffix(file.path)
        if kind == "tar":
            yield from _members(file, fps, max_frames, rejected)
        elif kind in PICTURE.suffixes:
            if (data := _read(file, PICTURE, rejected)) is not None:
                yield ImageRequest(data)
        elif kind in VIDEO.suffixes and "://" not in file.path:
            yield VideoRequest(file.path, fps, max_frames)
        elif kind in VIDEO.suffixes and (data := _read(file, VIDEO, rejected)) is not None:
            yield VideoRequest(data, fps, max_frames)


def _read(file: InputFile, kind: Kind, rejected: Counter[str]) -> bytes | None:
    """The whole file; None where it is larger than its kind may be."""
    with open_unpacked(file.path) as raw:
        data = raw.read(kind.max_bytes + 1)
    if len(data) <= kind.max_bytes:
        return data
    rejected["too large"] += 1
    return None


def _members(
    tar: InputFile, fps: float, max_frames: int, rejected: Counter[str]
) -> Iterator[ImageRequest | VideoRequest]:
    limits = {ending: kind.max_bytes for kind in (PICTURE, VIDEO) for ending in kind.suffixes}
    with open_unpacked(tar.path) as raw:
        try:
            for member in read_members(raw, lambda name: limits.get(suffix(name))):
                if member.problem is not None:
                    rejected[member.problem[0]] += 1
                elif member.data and suffix(member.name) in PICTURE.suffixes:
                    yield ImageRequest(member.data)
                elif member.data:
                    yield VideoRequest(member.data, fps, max_frames)
        except DamagedTar:
            rejected["damaged"] += 1
