"""Frames a second of our decoding beside the loop that people write: decord, then PIL's resize, in one process.

    .venv/bin/python benchmarks/decode_frames.py [VIDEO.mp4 | CLIPS.tar ...] [--fps 4] [--rounds 3] [--processes 2]

All take the same clips from memory, in turn. The plain loop takes frame number t * average rate, which is the wrong
frame where the rate varies; ours go by time stamps. Ratios are of the fastest rounds. Images: the clips' own frames
as JPEG of 512 pixels, beside PIL in one process.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from lwm_data.vision.decode_pool import Chunk, DecodePool, Failure, ImageRequest, VideoRequest
from lwm_data.vision.frames import FRAME, decode_image, decode_video

ROOT = Path(__file__).parents[1]
CLIPS = ROOT / "manifests" / "demo" / "clips" / "00000.tar"


def read_clips(paths: list[Path]) -> list[bytes]:
    """The videos' bytes."""
    clips = []
    for path in paths:
        if path.suffix == ".tar":
            with tarfile.open(path) as archive:
                members = [member for member in archive if Path(member.name).suffix in (".mp4", ".webm", ".mkv")]
                clips += [file.read() for member in members if (file := archive.extractfile(member)) is not None]
        else:
            clips.append(path.read_bytes())
    return clips


def cut_square(image: Image.Image) -> np.ndarray:
    """As the LWM release does it."""
    scale = FRAME / min(image.size)
    wide, high = int(image.width * scale), int(image.height * scale)
    left, top = (wide - FRAME) / 2, (high - FRAME) / 2
    return np.asarray(image.resize((wide, high)).crop((left, top, left + FRAME, top + FRAME)))  # type: ignore[arg-type]


def decode_plainly(clips: list[bytes], fps: float) -> int:
    """Frames of the clips, by decord and PIL."""
    import decord

    count = 0
    for data in clips:
        reader = decord.VideoReader(io.BytesIO(data))
        rate = reader.get_avg_fps()
        numbers = [min(round(i * rate / fps), len(reader) - 1) for i in range(int(len(reader) / rate * fps))]
        for rgb in reader.get_batch(numbers).asnumpy():
            count += cut_square(Image.fromarray(rgb)).shape[0] == FRAME
    return count


def drain(results: list[Chunk | Failure]) -> int:
    """Frames that came; none may be missing."""
    assert not any(isinstance(result, Failure) for result in results), results
    return sum(len(result.frames) for result in results if isinstance(result, Chunk))


def compare(name: str, ways: dict[str, Callable[[], int]], rounds: int) -> None:
    """Print the frames a second of each way, and its ratio to the first."""
    best = dict.fromkeys(ways, 0.0)
    for _ in range(rounds):
        for way, run in ways.items():
            begin = time.perf_counter()
            best[way] = max(best[way], run() / (time.perf_counter() - begin))
    print(name)
    base = next(iter(best.values()))
    for way, rate in best.items():
        print(f"  {way:38} {rate:8.0f} /s   ratio {rate / base:5.2f}")


def main() -> None:
    """Time all ways in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="*", type=Path, default=[CLIPS])
    parser.add_argument("--fps", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    clips = read_clips(options.videos)
    import av  # noqa: F401 (before decord: where decord is loaded first, av loses a codec of the same library)

    def in_one_process(decoder: str) -> int:
        return sum(1 for data in clips for _ in decode_video(data, fps=options.fps, max_frames=None, decoder=decoder))  # type: ignore[arg-type]

    photos = []
    for data in clips:
        for frame in decode_video(data, fps=options.fps, max_frames=20):
            file = io.BytesIO()
            Image.fromarray(frame).resize((512, 384)).save(file, "JPEG", quality=90)
            photos.append(file.getvalue())
    photos *= max(1, 400 // len(photos))

    with DecodePool(1) as one, DecodePool(options.processes) as many:
        videos = [VideoRequest(data, options.fps) for data in clips]
        images = [ImageRequest(data) for data in photos]
        compare(
            f"{len(clips)} clips at {options.fps:g} frames a second",
            {
                "decord + PIL, one process": lambda: decode_plainly(clips, options.fps),
                "ours, this process, decord": lambda: in_one_process("decord"),
                "ours, this process, pyav": lambda: in_one_process("pyav"),
                "ours, pool of 1": lambda: drain(list(one.decode(videos))),
                f"ours, pool of {options.processes}": lambda: drain(list(many.decode(videos))),
            },
            options.rounds,
        )
        compare(
            f"{len(photos)} JPEGs of 512 x 384",
            {
                "PIL, one process": lambda: sum(
                    len(cut_square(Image.open(io.BytesIO(data)).convert("RGB"))) == FRAME for data in photos
                ),
                "ours, this process": lambda: sum(len(decode_image(data)) == FRAME for data in photos),
                "ours, pool of 1": lambda: drain(list(one.decode(images))),
                f"ours, pool of {options.processes}": lambda: drain(list(many.decode(images))),
            },
            options.rounds,
        )


if __name__ == "__main__":
    main()
