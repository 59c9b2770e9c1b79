"""Frames at times, by either of two decoders behind one interface, bit for bit the same on a sound file.

    frames_by_pyav(source, clip, times)   \\   for each time, in order, the frame that is shown then, at the video's
    frames_by_decord(source, clip, times) /   own size, turned as its display matrix says (by quarter turns; mirrored
                                              ones and pixels that are not square are taken as they are)

PyAV is the default: it raises where a frame is damaged, decord conceals. What a cut file has lost is known before
(clip.py), for both. decord's time stamps are float32: from 2 hours on it may choose the neighbouring frame.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64, UInt8

from lwm_data.vision.clip import TOLERANCE, Clip, last_begun, open_video

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

WORTH_SEEKING = 25  # frames; a seek throws away what the decoder has at hand


def frames_by_pyav(
    source: bytes | str | Path, clip: Clip, times: Float64[np.ndarray, " n"]
) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """One frame per time; the same array again while the same frame is shown. ValueError(reason, detail)."""
    import av

    done = 0
    if clip.stamped:
        shown = clip.shown_at(times)
        with open_video(source) as (container, stream):
            for stamp, frame in _wanted_frames(container, stream, clip, [int(pts) for pts in np.unique(shown)]):
                rgb = _to_rgb(frame)
                while done < len(shown) and shown[done] == stamp:
                    yield rgb
                    done += 1
    if done == len(times):
        return
    # Stamps that the packets and the frames do not agree on, or an error, which now comes back if it is real.
    with open_video(source) as (container, stream):
        try:
            yield from _by_decoding_all(container, stream, times[done:])
        except MemoryError:
            raise
        except av.FFmpegError as error:
            raise ValueError("damaged", f"cannot be decoded to its end: {error}") from None


def _wanted_frames(
    container: InputContainer, stream: VideoStream, clip: Clip, wanted: list[int]
) -> Iterator[tuple[int, VideoFrame]]:
    """The frames of the ascending stamps `wanted`; ends at the first that does not turn up.

    What is not wanted is decoded only where other frames refer to it, and jumped over where that is farther than
    WORTH_SEEKING frames: neither changes a value of the frames that are.
    """
    import av

    needed = frozenset(wanted)
    packets = container.demux(stream)
    frames: deque[VideoFrame] = deque()
    position = int(clip.pts[0])
    try:
        for stamp in wanted:
            key = int(np.searchsorted(clip.key_pts, stamp, side="right")) - 1
            if key >= 0 and np.diff(np.searchsorted(clip.pts, [position, clip.key_pts[key]])) > WORTH_SEEKING:
                container.seek(int(clip.key_dts[key]), stream=stream)
                packets = container.demux(stream)
                frames.clear()
            position = stamp
            while not frames or frames[0].pts != stamp:
                if frames:
                    late = frames.popleft()
                    if late.pts is None or late.pts > stamp:
                        return
                    continue
                packet = next(packets, None)
                if packet is None:
                    return
                stream.codec_context.skip_frame = "DEFAULT" if packet.pts in needed else "NONREF"
                frames.extend(packet.decode())
            yield stamp, frames[0]
    except MemoryError:
        raise
    except av.FFmpegError:
        return


def _by_decoding_all(
    container: InputContainer, stream: VideoStream, times: Float64[np.ndarray, " n"]
) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    assert stream.time_base is not None
    done = 0
    first: int | None = None
    last: VideoFrame | None = None
    for frame in container.decode(stream):
        if frame.pts is None:
            raise ValueError("no time stamps", "a frame without one")
        first = frame.pts if first is None else first
        begins = float((frame.pts - first) * stream.time_base)
        if last is not None and times[done] + TOLERANCE < begins:
            rgb = _to_rgb(last)
            while times[done] + TOLERANCE < begins:
                yield rgb
                done += 1
                if done == len(times):
                    return
        last = frame
    if last is None:
        raise ValueError("no frames", "none of the video's frames can be decoded")
    rgb = _to_rgb(last)
    for _ in times[done:]:
        yield rgb


def _to_rgb(frame: VideoFrame) -> UInt8[np.ndarray, "height width 3"]:
    if frame.is_corrupt:
        raise ValueError("damaged", f"the frame at {frame.time or 0:,.2f} s could not be decoded whole")
    rgb = frame.to_ndarray(format="rgb24")
    return np.rot90(rgb, frame.rotation // 90) if frame.rotation % 90 == 0 else rgb


def frames_by_decord(
    source: bytes | str | Path, clip: Clip, times: Float64[np.ndarray, " n"]
) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """As frames_by_pyav. decord turns frames itself."""
    import av  # noqa: F401 (first: where decord is loaded before it, av loses a codec of the same library)
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    try:
        reader: Any = decord.VideoReader(file, num_threads=1)
        starts = np.asarray(reader.get_frame_timestamp(np.arange(len(reader))))[:, 0].astype(np.float64)
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise ValueError("unsupported", f"by decord: {_message(error)}; decoder: pyav may") from None
    except UnicodeEncodeError:
        raise ValueError("unsupported", "by decord: a path that is not UTF-8; decoder: pyav may") from None
    if not np.all(np.isfinite(starts)) or np.any(np.diff(starts) <= 0):
        raise ValueError("no time stamps", "decord reads none that ascend; decoder: pyav may")
    if len(starts) < len(clip.pts):
        raise ValueError("damaged", f"decord finds {len(starts):,} of {len(clip.pts):,} frames")
    at = -1
    for number in last_begun(starts - starts[0], times):
        try:
            # Where frames lead a keyframe, decord lands on a wrong one after a seek, and skip_frames seeks too.
            while at < number:
                picture = reader[int(number)] if clip.closed else reader.next()
                at = int(number) if clip.closed else at + 1
                rgb = None
        except (decord.DECORDError, RuntimeError, IndexError, StopIteration) as error:
            raise ValueError("damaged", f"frame {number:,}: {_message(error)}") from None
        rgb = picture.asnumpy() if rgb is None else rgb
        yield rgb


def _message(error: Exception) -> str:
    """Without the time of day, which decord puts first: the same file gives the same words."""
    return str(error).strip().split("\n")[0].split("] ")[-1]
