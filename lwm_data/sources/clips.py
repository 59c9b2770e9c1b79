"""The clips and chapters that a video's metadata names, and their times.

    "clips": [[0, 4.5], ["00:00:04.500", "00:00:09.000"]]     "clips_captions": ["A dog runs.", "It barks."]
    "chapters": [{"title": "Start", "start_time": 0, "end_time": 30}, ...]       or in yt_meta_dict.info
    "subtitles": [{"start": 0, "end": 2, "lines": ["So here"]}, ...]             captions of clips without their own

video2dataset cuts a video where it is told to, names each piece `00012_00003` in its tar, and leaves in its metadata
where in the whole the piece was: such a file *is* the clip.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from lwm_data.sources.fields import Fields
from lwm_data.sources.record import Rejection

CLOCK = re.compile(r"(\d{1,4}):([0-5]?\d):([0-5]?\d(?:[.,]\d*)?)")
CUT_NAME = re.compile(r"\d+_\d+")


@dataclass(frozen=True)
class Clip:
    """start, end: seconds; None: from the start, to the end. caption: its own, if it has one."""

    key: str
    start: float | None
    end: float | None
    caption: str | None


def read_clips(key: str, name: str, fields: Fields, is_asked: bool | None) -> Iterator[Clip | Rejection]:
    """The clips of the video `key`, as `key:0000`; itself where it has none. name: of the member of a tar, or "".

    is_asked: whether clips are to be cut; None: but where the file was cut already.
    """
    spans = [] if is_asked is False else _spans(fields)
    if not spans or (is_asked is None and len(spans) == 1 and CUT_NAME.fullmatch(name)):
        yield Clip(key, None, None, None)
        return
    for number, (start, end, caption) in enumerate(spans):
        clip_key = f"{key}:{number:04d}"
        if start is None or end is None:
            yield Rejection(clip_key, "bad times", "wanted start and end of each clip")
            continue
        clip = make_clip(clip_key, start, end, caption)
        if isinstance(clip, Clip) and clip.caption is None:
            clip = replace(clip, caption=_subtitles(fields, clip.start, clip.end))
        yield clip


def make_clip(key: str, start: Any, end: Any, caption: str | None = None) -> Clip | Rejection:
    """The clip from `start` to `end`, each seconds, H:MM:SS or None."""
    times = [None if time is None else _seconds(time) for time in (start, end)]
    for time, seconds in zip((start, end), times, strict=True):
        if time is not None and seconds is None:
            return Rejection(key, "bad times", f"got {str(time)[:60]!r}; wanted seconds, 0 or more, or H:MM:SS")
    if times[1] is not None and (times[0] or 0.0) >= times[1]:
        return Rejection(key, "bad times", f"got {times[0]} to {times[1]}; wanted start < end")
    return Clip(key, times[0], times[1], caption)


def _seconds(time: Any) -> float | None:
    """None where `time` is none."""
    if isinstance(time, str):
        clock = CLOCK.fullmatch(time.strip())
        if clock:
            hours, minutes, seconds = clock.groups()
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds.replace(",", "."))
    try:
        number = math.nan if isinstance(time, bool) else float(time)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _spans(fields: Fields) -> list[tuple[Any, Any, str | None]]:
    """start, end and caption of each clip as they stand there; None for what is not."""
    clips = fields.find("clips")
    if isinstance(clips, list) and clips:
        if len(clips) == 2 and not any(isinstance(clip, list) for clip in clips):
            clips = [clips]
        captions = _list(fields.find("clips_captions"))
        own = [captions[i] if i < len(captions) and isinstance(captions[i], str) else None for i in range(len(clips))]
        pairs = [clip if isinstance(clip, list) and len(clip) == 2 else (None, None) for clip in clips]
        return [(start, end, caption) for (start, end), caption in zip(pairs, own, strict=True)]
    chapters = _list(fields.find("chapters") or _dict(_dict(fields.find("yt_meta_dict")).get("info")).get("chapters"))
    found = [_dict(chapter) for chapter in chapters]
    titles = [chapter.get("title") for chapter in found]
    return [
        (chapter.get("start_time"), chapter.get("end_time"), title if isinstance(title, str) else None)
        for chapter, title in zip(found, titles, strict=True)
    ]


def _subtitles(fields: Fields, start: float | None, end: float | None) -> str | None:
    """What is said from `start` to `end`, of the first language; None where nothing is."""
    subtitles = fields.find("subtitles") or _dict(fields.find("yt_meta_dict")).get("subtitles")
    if isinstance(subtitles, dict):
        subtitles = next(iter(subtitles.values()), None)
    words = []
    for line in map(_dict, _list(subtitles)):
        begin, stop = _seconds(line.get("start")), _seconds(line.get("end"))
        said = line.get("lines", line.get("text"))
        if begin is not None and stop is not None and begin < (end or math.inf) and stop > (start or 0.0):
            words += [text.strip() for text in (said if isinstance(said, list) else [said]) if isinstance(text, str)]
    return " ".join(words) or None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
