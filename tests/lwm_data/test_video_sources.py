"""Videos with captions out of tars, lists and folders: their clips, their times, and the units they are read in."""

from __future__ import annotations

import csv
import json
import tarfile
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_data.manifest_sources import Videos
from lwm_data.sources.clips import Clip, make_clip
from lwm_data.sources.files import InputFile, find_files, hash_file
from lwm_data.sources.media import MediaItem, group_files
from lwm_data.sources.record import Rejection
from lwm_data.sources.videos import read_videos

CLIPS_CSV = """path,caption,start,end,score
v/1.mp4,"A dog runs, fast.",0,12.5,0.9
v/2.webm,1984,,,0.9
v/1.mp4,It barks.,00:00:12.5,20,0.1
"""


def _source(path: Path | str, **keys: Any) -> Videos:
    return Videos(name="clips", type="videos", path=str(path), fps=4, max_frames=8, **keys)


def _units(source: Videos) -> list[tuple[InputFile, ...]]:
    return group_files(source, find_files(source.path, "path"))


def _all(source: Videos) -> list[MediaItem | Rejection]:
    return [item for unit in _units(source) for item in read_videos(source, unit)]


def _told(items: list[MediaItem | Rejection]) -> list[tuple[Any, ...]]:
    """(key, caption, start, end) or (key, reason) of each."""
    return [
        (item.key, item.reason) if isinstance(item, Rejection) else (item.key, item.caption, item.start, item.end)
        for item in items
    ]


def _write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    return path


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, [("", "All.", None, None)]),
        ({"clips": [[0, 4.5], [4.5, 9]]}, [(":0000", "All.", 0, 4.5), (":0001", "All.", 4.5, 9)]),
        ({"clips": [1.5, 2.5]}, [(":0000", "All.", 1.5, 2.5)]),
        ({"clips": [["00:01:00.500", "01:00:00"]]}, [(":0000", "All.", 60.5, 3600)]),
        (
            {"clips": [[0, 1], [1, 2], [2, 3]], "clips_captions": ["A", None], "where": 1},
            [(":0000", "A", 0, 1), (":0001", "All.", 1, 2), (":0002", "All.", 2, 3)],
        ),
        (
            {"clips": [[0, 1], [1, 2]], "subtitles": [{"start": 0.5, "end": 1, "lines": ["So", " here "]}]},
            [(":0000", "So here", 0, 1), (":0001", "All.", 1, 2)],
        ),
        (
            {
                "clips": [[0, 9]],
                "yt_meta_dict": {"subtitles": {"en": [{"start": "0:00:01", "end": "0:00:02", "text": "Hi"}]}},
            },
            [(":0000", "Hi", 0, 9)],
        ),
        (
            {"chapters": [{"title": "Start", "start_time": 0.0, "end_time": 30}, {"start_time": 30, "end_time": 31}]},
            [(":0000", "Start", 0, 30), (":0001", "All.", 30, 31)],
        ),
        (
            {"yt_meta_dict": {"info": {"chapters": [{"title": "One", "start_time": 0, "end_time": 5}]}}},
            [(":0000", "One", 0, 5)],
        ),
        (
            {"clips": [[1, 1], [-1, 2], ["a", 2], [1], "x", [0, None], [float("nan"), 2], [3, float("inf")], [0, 2]]},
            [*((f":{i:04d}", "bad times") for i in range(8)), (":0008", "All.", 0, 2)],
        ),
        ({"clips": "0-5", "chapters": 7, "yt_meta_dict": "?"}, [("", "All.", None, None)]),
        ({"clips": [[0, 2]], "clips_captions": [" "]}, [(":0000", "no caption")]),
    ],
)
def test_each_clip_of_the_metadata_is_a_record(
    tmp_path: Path, fields: dict[str, Any], told: list[tuple[Any, ...]]
) -> None:
    data = json.dumps(fields).encode()
    tar = _write_tar(tmp_path / "0.tar", {"a.mp4": b"video", "a.txt": b"All.", "a.json": data})
    items = _all(_source(tar))
    assert _told(items) == [(f"0.tar/a{key}", *rest) for key, *rest in told]
    assert all(item.data == b"video" for item in items if isinstance(item, MediaItem))
    whole = _all(_source(tar, clips=False))
    assert _told(whole) == [("0.tar/a", "All.", None, None)]


def test_what_video2dataset_has_cut_is_not_cut_again(tmp_path: Path) -> None:
    cut = b'{"clips": [[10.0, 15.0]], "caption": "Cut."}'
    tar = _write_tar(tmp_path / "0.tar", {"000_00003.mp4": b"v", "000_00003.json": cut})
    assert _told(_all(_source(tar))) == [("0.tar/000_00003", "Cut.", None, None)]
    assert _told(_all(_source(tar, clips=True))) == [("0.tar/000_00003:0000", "Cut.", 10, 15)]
    # What a person calls a file says nothing.
    named = _write_tar(tmp_path / "1.tar", {"holiday_2023.mp4": b"v", "holiday_2023.json": cut})
    assert _told(_all(_source(named))) == [("1.tar/holiday_2023:0000", "Cut.", 10, 15)]
    _touch(tmp_path, "20230101_123456.mp4")
    (tmp_path / "20230101_123456.json").write_bytes(cut)
    assert _told(_all(_source(tmp_path / "*.mp4"))) == [("20230101_123456.mp4:0000", "Cut.", 10, 15)]


@given(start=st.floats(allow_nan=True), end=st.floats(allow_nan=True))
def test_times_of_a_clip_are_finite_and_in_order(start: float, end: float) -> None:
    clip = make_clip("k", start, end)
    if isinstance(clip, Clip):
        assert clip.start == start and clip.end == end and 0 <= start < end < float("inf")
    else:
        assert clip.reason == "bad times" and not 0 <= start < end < float("inf")


@pytest.mark.parametrize("time", [True, "x", "", "nan", "1:2", [], {}, b"x", 10**400, -1, "-0:00:01"])
def test_what_is_no_time_is_told(time: Any) -> None:
    clip = make_clip("k", time, None)
    assert isinstance(clip, Rejection) and clip.reason == "bad times"


def test_records_of_a_tar_are_taken_or_told_as_those_of_pictures(tmp_path: Path) -> None:
    tar = _write_tar(
        tmp_path / "0.tar",
        {"a.webm": b"v", "a.txt": b"A", "b.jpg": b"p", "b.txt": b"B", "c.mkv": b"v", "d.mov": b"v", "d.txt": b"D"},
    )
    (tmp_path / "0.tar").write_bytes(tar.read_bytes()[:-1] + b"x")
    told = _told(_all(_source(tar, min_size=100)))
    assert told == [
        ("0.tar/a", "A", None, None),
        ("0.tar/b", "no video"),
        ("0.tar/c", "no caption"),
        ("0.tar/d", "D", None, None),
        ("0.tar", "rest not read"),
    ]


def test_loose_videos_take_what_lies_beside_them(tmp_path: Path) -> None:
    _touch(tmp_path, "dog.mp4", "sub/cat_1.mkv", "no.avi")
    (tmp_path / "dog.txt").write_text("A dog.")
    (tmp_path / "sub" / "cat_1.json").write_text(
        '{"caption": "A cat.", "clips": [[0, 1], [1, 2]], "width": 64, "height": 64}'
    )
    items = _all(_source(tmp_path / "**"))
    assert sorted(_told(items)) == [
        ("dog.mp4", "A dog.", None, None),
        ("no.avi", "no caption"),
        ("sub/cat_1.mkv:0000", "A cat.", 0, 1),
        ("sub/cat_1.mkv:0001", "A cat.", 1, 2),
    ]
    assert {item.data for item in items if isinstance(item, MediaItem)} == {
        str(tmp_path / "dog.mp4"),
        str(tmp_path / "sub" / "cat_1.mkv"),
    }
    assert Counter(
        item.reason for item in _all(_source(tmp_path / "**", min_size=65)) if isinstance(item, Rejection)
    ) == {
        "filtered: min_size": 2,
        "no caption": 1,
    }


def _lists(folder: Path) -> dict[str, Path]:
    """The same list three times."""
    (folder / "a.csv").write_text("\ufeff" + CLIPS_CSV, encoding="utf-8")
    rows: list[dict[str, Any]] = [
        {"path": "v/1.mp4", "caption": "A dog runs, fast.", "start": 0, "end": 12.5, "score": 0.9},
        {"path": "v/2.webm", "caption": "1984", "start": None, "end": None, "score": 0.9},
        {"path": "v/1.mp4", "caption": "It barks.", "start": 12.5, "end": 20, "score": 0.1},
    ]
    (folder / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    return {kind: folder / f"a.{kind}" for kind in ("csv", "jsonl", "parquet")}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_list_names_files_and_times(tmp_path: Path, kind: str) -> None:
    _touch(tmp_path, "v/1.mp4", "v/2.webm")
    path = _lists(tmp_path)[kind]
    name = path.name
    assert sorted(_told(_all(_source(path)))) == [
        (f"{name}/v/1.mp4:0000", "A dog runs, fast.", 0, 12.5),
        (f"{name}/v/1.mp4:0001", "It barks.", 12.5, 20),
        (f"{name}/v/2.webm:0000", "1984", None, None),
    ]
    filtered = _all(_source(path, where="score > 0.5"))
    assert sum(isinstance(item, MediaItem) for item in filtered) == 2
    assert ("filtered: where",) in {told[1:] for told in _told(filtered)}
    assert {told[1:2] for told in _told(_all(_source(path, caption="score")))} <= {("0.9",), ("0.1",), ("wrong field",)}


def test_videos_of_a_list_are_files_of_its_units_and_each_row_is_in_one(tmp_path: Path) -> None:
    names = [f"v/{i:04d}.mp4" for i in range(300)]
    _touch(tmp_path, *names)
    rows = [{"path": name, "caption": f"{name} {k}", "start": k, "end": k + 1} for k in range(2) for name in names]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = _source(tmp_path / "l.jsonl")
    units = _units(source)
    assert units[0] == (InputFile(str(tmp_path / "l.jsonl"), "l.jsonl"),)
    assert 5 < len(units) < 60 and all(unit[0].key == "l.jsonl" for unit in units)
    assert sorted(file.key for unit in units for file in unit[1:]) == names
    assert all(hash_file(None, file).num_bytes for unit in units for file in unit)
    items = [item for unit in units for item in read_videos(source, unit)]
    assert sorted(item.key for item in items) == sorted(f"l.jsonl/{name}:{k:04d}" for name in names for k in range(2))


def test_what_a_list_may_not_name_is_told_once(tmp_path: Path) -> None:
    _touch(tmp_path, "lists/v/1.mp4", "secret.mp4", "lists/dir/x")
    here = str(tmp_path / "lists")
    paths = [
        "v/1.mp4",
        f"{here}/v/../v/1.mp4",
        "../secret.mp4",
        f"{here}/../secret.mp4",
        "/etc/passwd",
        "v/../../secret.mp4",
    ]
    paths += ["https://example.org/1.mp4", "file:///\udc80", "v/2.mp4", "dir", ".", "", "a\0b", "\ud800", "l.jsonl"]
    lines = [json.dumps({"path": path, "caption": "A"}) for path in paths]
    lines += [
        "[1]",
        "{",
        '{"caption": "A"}',
        '{"path": 7}',
        '{"path": "v/1.mp4", "caption": "A", "start": 5, "end": 1}',
    ]
    (tmp_path / "lists" / "l.jsonl").write_text("\n".join([*lines, '{"path": "v/1.mp4"}']))
    told = _told(_all(_source(tmp_path / "lists" / "*.jsonl")))
    assert [entry for entry in told if len(entry) == 4] == [
        ("l.jsonl/v/1.mp4:0000", "A", None, None),
        ("l.jsonl/v/1.mp4:0001", "A", None, None),
    ]
    assert len(told) == len(lines) + 1 and all(repr(entry).isascii() for entry in told)
    assert Counter(entry[1] for entry in told if len(entry) == 2) == {
        "unsafe name": 8,
        "not a local file": 1,
        "no such file": 2,
        "no video": 4,
        "wrong field": 1,
        "not JSON": 1,
        "bad times": 1,
        "no caption": 1,
    }


def test_a_missing_video_that_comes_changes_the_unit_that_told_of_it(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("path,caption\nv/1.mp4,A\nv/2.mp4,B\n")
    source = _source(tmp_path / "l.csv")
    _touch(tmp_path, "v/1.mp4")
    before = _units(source)
    assert _told(_all(source)) == [("l.csv/v/2.mp4", "no such file"), ("l.csv/v/1.mp4:0000", "A", None, None)]
    _touch(tmp_path, "v/2.mp4")
    assert sorted(_told(_all(source))) == [
        ("l.csv/v/1.mp4:0000", "A", None, None),
        ("l.csv/v/2.mp4:0000", "B", None, None),
    ]
    assert before[0] not in _units(source)
    assert all(hash_file(None, file).sha256 for file in before[0])


def test_a_csv_that_breaks_off_is_told_and_so_are_its_bad_rows(tmp_path: Path) -> None:
    _touch(tmp_path, "1.mp4")
    lines = [
        b"path,caption",
        b"1.mp4,A",
        b"1.mp4,a, b",
        b"1.mp4",
        b"",
        b"1.mp4,\xff",
        b'1.mp4,"B"',
        b'1.mp4,"B"x',
        b"1.mp4,C",
    ]
    (tmp_path / "l.csv").write_bytes(b"\n".join(lines))
    told = _told(_all(_source(tmp_path / "l.csv")))
    assert sorted(told) == [
        ("l.csv/1.mp4:0000", "A", None, None),
        ("l.csv/1.mp4:0001", "B", None, None),
        ("l.csv:3", "wrong field"),
        ("l.csv:4", "wrong field"),
        ("l.csv:6", "not UTF-8"),
        ("l.csv:8", "rest not read"),
    ]
    (tmp_path / "l.csv").write_bytes(b"path,caption\n1.mp4," + b"A" * 500_000 + b"\n1.mp4,B\n")
    usual = csv.field_size_limit()
    assert _told(_all(_source(tmp_path / "l.csv"))) == [
        ("l.csv/1.mp4:0000", "caption too long"),
        ("l.csv/1.mp4:0001", "B", None, None),
    ]
    assert csv.field_size_limit() == usual
    (tmp_path / "l.csv").write_bytes(b"path,caption\n1.mp4," + b"A" * (2 << 20))
    assert _told(_all(_source(tmp_path / "l.csv"))) == [("l.csv:1", "rest not read")]


@pytest.mark.parametrize("content", [b"", b"\n", b"path,caption\n", b"\x00" * 100, b'"'])
def test_an_empty_list_is_one_unit_without_videos(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "l.csv").write_bytes(content)
    source = _source(tmp_path / "l.csv")
    assert len(_units(source)) == 1
    assert not any(isinstance(item, MediaItem) for item in _all(source))
