"""What a video file tells before a frame of it is decoded: its bounds, its frames' time stamps, whether it is whole.

    packets, in the file's order     I0   P3   B1   B2   P6  ...     each with its time stamp
    frames, as they are shown        0    1    2    3    ...         time 0 is the first frame's
                                     |----|--|---------|----|
                                          t                          shown at t: the last frame that began by then

All packets of all streams are read once, which is cheap beside decoding (some percent) and makes both decoders agree
on what is damaged: a cut file is found here. What cannot be found: the lost tail of a format that claims no length
(MPEG-TS; a fragmented MP4 cut between fragments).
"""

from __future__ import annotations

import contextlib
import io
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64, Int64

from lwm_data.vision.square import check_size

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream

MAX_VIDEO_SIDE = 8192  # pixels
MAX_VIDEO_PIXELS = 8192 * 4608  # of one frame; a decoder holds up to 16 of them
MAX_VIDEO_FRAMES = 3_000_000  # in the file, and sampled of it
MAX_DURATION = 12 * 3600.0  # seconds
TOLERANCE = 0.0006  # seconds: containers round time stamps to a millisecond
# A playlist or a script that names other files must not be opened: it could read any file of this machine.
FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg"
MAGIC = (b"ftyp", b"moov", b"\x1aE\xdf\xa3", b"AVI ", b"FLV")  # near the start of a file that may be a cut video


@dataclass(frozen=True)
class Clip:
    """Time stamps in units of `time_base` seconds, as the file has them.

    pts: int64[num_frames], when each frame is shown, ascending. key_pts, key_dts: int64[k] of the frames where
    decoding can begin. duration_s: from the first frame to the end of the last. stamped: each frame has one stamp of
    its own; where not, frames are found only by decoding from the start. closed: no frame that follows a keyframe in
    the file is shown before it.
    """

    time_base: float
    pts: Int64[np.ndarray, " num_frames"]
    key_pts: Int64[np.ndarray, " k"]
    key_dts: Int64[np.ndarray, " k"]
    duration_s: float
    stamped: bool
    closed: bool

    def shown_at(self, times: Float64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The time stamp of the frame that is shown at each of `times`, seconds from the first frame."""
        return np.asarray(self.pts[last_begun((self.pts - self.pts[0]) * self.time_base, times)])


def last_begun(starts: Float64[np.ndarray, " num_frames"], times: Float64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """The number of the last frame whose start, in ascending `starts`, is not after each of `times`. Seconds."""
    return np.maximum(np.searchsorted(starts, times + TOLERANCE, side="right") - 1, 0)


@contextlib.contextmanager
def open_video(source: bytes | str | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file and its video stream, to be decoded by one thread. ValueError(reason, detail) where there is none."""
    import av

    av.logging.set_level(None)  # what is wrong comes back as an error
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
        container = av.open(file, "r", options=options, metadata_errors="replace")
    except MemoryError:
        raise
    except av.FFmpegError as error:
        raise _cannot_open(source, error) from None
    with container:
        stream = container.streams.best("video")
        is_cover = stream is not None and bool(stream.disposition & av.stream.Disposition.attached_pic)
        if not isinstance(stream, av.VideoStream) or is_cover:
            raise ValueError("no video", f"{len(container.streams):,} streams, none of them of pictures that move")
        _check_stream(stream)
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(MAX_VIDEO_PIXELS)}  # a stream may grow on its way
        yield container, stream


def _message(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__  # without the path: words to be compared


def _cannot_open(source: bytes | str | Path, error: Exception) -> ValueError:
    if isinstance(source, bytes):
        head = source[:64]
    else:
        try:
            with open(source, "rb") as file:
                head = file.read(64)
        except OSError as unreadable:
            return ValueError("unreadable", str(unreadable))
    if any(magic in head for magic in MAGIC):
        return ValueError("truncated", "begins as a video, and has no table of its frames: cut before its end?")
    return ValueError("not a video", f"{_message(error)}; begins with {head[:8]!r}")


def _check_stream(stream: VideoStream) -> None:
    if stream.codec_context is None or not stream.width or not stream.height:
        raise ValueError("no video", "a video stream of unknown size or codec")
    check_size(stream.width, stream.height)
    if max(stream.width, stream.height) > MAX_VIDEO_SIDE or stream.width * stream.height > MAX_VIDEO_PIXELS:
        raise ValueError(
            "too large",
            f"{stream.width:,} x {stream.height:,} pixels; "
            f"wanted at most {MAX_VIDEO_SIDE:,} on a side and {MAX_VIDEO_PIXELS:,} in all",
        )


def read_clip(source: bytes | str | Path) -> Clip:
    """The clip in `source`. ValueError(reason, detail) where it is out of bounds, empty or cut."""
    import av

    with open_video(source) as (container, stream):
        assert stream.time_base is not None
        claimed = (container.duration or 0) / av.time_base
        if claimed > MAX_DURATION:
            raise ValueError("too long", f"{claimed:,.0f} s; wanted at most {MAX_DURATION:,.0f}")
        packets = _Packets(stream.index)
        try:
            for packet in container.demux():
                packets.add(packet)
        except MemoryError:
            raise
        except av.FFmpegError as error:
            raise ValueError("truncated", f"after {len(packets.pts):,} frames: {_message(error)}") from None
        clip = packets.clip(float(stream.time_base), float(stream.average_rate or 25))
        is_mp4 = "mp4" in container.format.name  # the only one whose count of frames is exact
        if is_mp4 and packets.num_video < stream.frames:
            raise ValueError("truncated", f"{packets.num_video:,} of {stream.frames:,} frames are there")
        frame = clip.duration_s / len(clip.pts)
        if packets.end - packets.begin < claimed - max(0.5, 2 * frame, 0.01 * claimed):
            raise ValueError("truncated", f"{packets.end - packets.begin:,.2f} s of {claimed:,.2f} are there")
        if container.format.name == "avi" and container.size < (claims := _riff_bytes(source)):  # it claims no length
            raise ValueError("truncated", f"{container.size:,} bytes of {claims:,} are there")
        return clip


def _riff_bytes(source: bytes | str | Path) -> int:
    """How long a RIFF file says that it is (its first GB, where it is longer)."""
    if isinstance(source, bytes):
        head = source[:8]
    else:
        with open(source, "rb") as file:
            head = file.read(8)
    return 8 + int.from_bytes(head[4:], "little")


class _Packets:
    """Sums up the packets of a file."""

    def __init__(self, video: int) -> None:
        self.video = video  # the stream's index
        self.pts = array("q")
        self.key_pts = array("q")
        self.key_dts = array("q")
        self.num_video = 0
        self.last_end = 0  # of the video
        self.stamped = True
        self.closed = True
        self.begin = float("inf")  # of all streams, s
        self.end = float("-inf")

    def add(self, packet: av.Packet[av.stream.Stream]) -> None:
        if not packet.size:
            return
        pts = packet.pts if packet.pts is not None else packet.dts
        if pts is not None and packet.time_base is not None:
            self.begin = min(self.begin, float(pts * packet.time_base))
            self.end = max(self.end, float((pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index != self.video:
            return
        self.num_video += 1
        if packet.is_corrupt:
            raise ValueError("truncated", f"frame {self.num_video:,} is not there in full")
        if self.num_video > MAX_VIDEO_FRAMES:
            raise ValueError("too long", f"more than {MAX_VIDEO_FRAMES:,} frames")
        if pts is None:
            raise ValueError("no time stamps", f"frame {self.num_video:,} has none")
        self.stamped = self.stamped and packet.pts is not None
        if packet.is_keyframe and packet.dts is not None:
            self.key_pts.append(pts)
            self.key_dts.append(packet.dts)
        self.closed = self.closed and (not self.key_pts or pts >= self.key_pts[-1])
        if not packet.is_discard:  # it is, where an edit list begins later
            self.pts.append(pts)
            self.last_end = max(self.last_end, pts + (packet.duration or 0))

    def clip(self, time_base: float, rate: float) -> Clip:
        if not self.pts:
            raise ValueError("no frames", "a video stream without a frame")
        pts = np.sort(np.array(self.pts, np.int64))
        end = self.last_end if self.last_end > pts[-1] else pts[-1] + 1 / (rate * time_base)
        duration = float((end - pts[0]) * time_base)
        if duration > MAX_DURATION:
            raise ValueError("too long", f"{duration:,.0f} s; wanted at most {MAX_DURATION:,.0f}")
        by_time = np.argsort(np.array(self.key_pts, np.int64), kind="stable")
        return Clip(
            time_base=time_base,
            pts=pts,
            key_pts=np.array(self.key_pts, np.int64)[by_time],
            key_dts=np.array(self.key_dts, np.int64)[by_time],
            duration_s=duration,
            stamped=self.stamped and bool(np.all(pts[1:] > pts[:-1])),
            closed=self.closed,
        )
