"""Videos: clips with captions in video2dataset's tars, named by lists, or as files in folders.

00000.tar     000000007.mp4  000000007.txt  000000007.json       one record, or one for each clip or chapter:
                                                                  00000.tar/000000007:0000, :0001, ...
clips.csv     path,caption,start,end                              clips.csv/v/1.mp4:0000, :0001, ... by its rows
videos/       dog.mp4  dog.txt  dog.json
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterator

from lwm_data.manifest_sources import Videos
from lwm_data.sources.clips import make_clip, read_clips
from lwm_data.sources.fields import UnreadableField
from lwm_data.sources.files import InputFile
from lwm_data.sources.media import MediaItem, admit
from lwm_data.sources.media_units import VIDEOS, file_exists, suffix
from lwm_data.sources.record import Rejection
from lwm_data.sources.samples import Kind, load_media, loose_samples, tar_samples
from lwm_data.sources.video_lists import LISTS, ListRow, listed_video, read_list

VIDEO = Kind("video", VIDEOS, 1 << 30, is_streamed=True)  # a decoder holds three times the bytes of a tar's member


def read_videos(source: Videos, files: tuple[InputFile, ...]) -> Iterator[MediaItem | Rejection]:
    """The videos of one unit, as `group_files` makes them, in the order of the file."""
    kind = suffix(files[0].path)
    if kind in LISTS:
        yield from _read_list(source, files)
        return
    samples = tar_samples(files, VIDEO) if kind == "tar" else loose_samples(files, VIDEO)
    for sample in samples:
        if isinstance(sample, Rejection):
            yield sample
            continue
        name = posixpath.basename(sample.name) if kind == "tar" else ""  # a person may call a file anything
        try:
            clips = list(read_clips(sample.key, name, sample.fields, source.clips))
        except UnreadableField as error:
            clips = [Rejection(sample.key, *error.args)]
        for clip in clips:
            if isinstance(clip, Rejection):
                yield clip
            else:
                yield admit(source, clip.key, sample.data, sample.fields, clip.start, clip.end, clip.caption)


def _read_list(source: Videos, files: tuple[InputFile, ...]) -> Iterator[MediaItem | Rejection]:
    """The rows whose video is among `files`; where none is, the rows that name no video there is."""
    list_file = files[0]
    videos = {file.path: file for file in files if file.path != list_file.path}
    rows_of: Counter[str] = Counter()
    for row in read_list(list_file, source.caption):
        video = row if isinstance(row, Rejection) else listed_video(list_file, row)
        if isinstance(video, Rejection):
            if not videos:
                yield video
        elif videos:
            if video.path in videos:
                assert isinstance(row, ListRow), "it names a video"
                key = f"{list_file.key}/{_below(list_file, video)}:{rows_of[video.path]:04d}"
                yield _read_row(source, key, video, row)
                rows_of[video.path] += 1
        elif not file_exists(video.path):
            key = f"{list_file.key}/{_below(list_file, video)}"
            yield Rejection(key, "no such file", "the list names it; wanted a video below the list's folder")


def _below(list_file: InputFile, video: InputFile) -> str:
    return video.key[len(posixpath.dirname(list_file.key)) :].lstrip("/")


def _read_row(source: Videos, key: str, video: InputFile, row: ListRow) -> MediaItem | Rejection:
    try:
        clip = make_clip(key, row.fields.find("start"), row.fields.find("end"))
        if isinstance(clip, Rejection):
            return clip
        data = load_media(video, VIDEO)
        if isinstance(data, Rejection):
            return data
        return admit(source, key, data, row.fields, clip.start, clip.end)
    except UnreadableField as error:
        return Rejection(key, *error.args)
