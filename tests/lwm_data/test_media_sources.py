"""Pictures with captions out of tars, files of rows and folders: which are taken, which not and why, and their runs."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from webdataset import tariterators

from lwm_data.format.vocab import EOV, TextTokenizer
from lwm_data.manifest_sources import Images
from lwm_data.sources.fields import Fields
from lwm_data.sources.files import InputFile, find_files
from lwm_data.sources.images import PICTURE, read_images
from lwm_data.sources.key_index import RECENT, KeyedRows, SeenKeys
from lwm_data.sources.media import MediaItem, admit, group_files, is_text_first, media_runs
from lwm_data.sources.record import Rejection

SHARD = Path(__file__).parent / "media" / "00000.tar"


def _source(path: Path | str = "x", **keys: Any) -> Images:
    return Images(name="photos", type="images", path=str(path), **keys)


def _picture(shade: int = 0, kind: str = "png") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, shade, shade)).save(file, kind)
    return file.getvalue()


def _write_tar(path: Path, members: dict[str, bytes | tarfile.TarInfo] | list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            content = b"" if isinstance(data, tarfile.TarInfo) else data
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def _all(source: Images) -> list[MediaItem | Rejection]:
    """Of all units that the source's glob makes."""
    return [item for unit in group_files(source, find_files(source.path, "path")) for item in read_images(source, unit)]


def _told(items: list[MediaItem | Rejection]) -> list[tuple[str, str]]:
    """(key, caption or reason) of each."""
    return [(item.key, item.reason if isinstance(item, Rejection) else item.caption) for item in items]


def test_a_real_shard_gives_what_webdataset_gives(tmp_path: Path) -> None:
    shutil.copy(SHARD, tmp_path)
    with SHARD.open("rb") as stream:
        members = tariterators.tar_file_expander([{"url": "", "stream": stream}])
        samples = list(tariterators.group_by_keys(members))
    wanted = [(f"00000.tar/{s['__key__']}", s["jpg"], s["txt"].decode(), None, None, 0) for s in samples]
    items = _all(_source(tmp_path / "*.tar"))
    assert all(isinstance(item, MediaItem) for item in items) and len(items) == 3
    assert [tuple(vars(item).values()) for item in items] == wanted


@pytest.mark.parametrize(
    ("keys", "taken", "reasons"),
    [
        ({"min_size": 400}, ["3", "10"], {"filtered: min_size": 1}),  # of the original: 1411, 300, 2988
        ({"where": "original_width > original_height"}, ["6", "10"], {"filtered: where": 1}),
        (
            {"where": "licence in ('CC0-1.0 (Clements Engelhardt)', '?') and caption > 'D'"},
            ["10"],
            {"filtered: where": 2},
        ),
        ({"where": "punsafe < 0.5"}, [], {"missing field": 3}),
        ({"where": "exif < 0.5"}, [], {"wrong field": 3}),
        ({"where": "error_message == 'x'"}, [], {"missing field": 3}),  # null is missing
        ({"min_size": 400, "where": "width != height"}, ["10"], {"filtered: min_size": 1, "filtered: where": 1}),
        ({"caption": "TEXT"}, [], {"no caption": 3}),
        ({"caption": "width"}, [], {"wrong field": 3}),
        ({"caption": "licence"}, ["3", "6", "10"], {}),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_filters_reject_by_reason(keys: dict[str, Any], taken: list[str], reasons: dict[str, int]) -> None:
    items = list(read_images(_source(**keys), (InputFile(str(SHARD), "s.tar"),)))
    assert [item.key.removeprefix("s.tar/").lstrip("0") for item in items if isinstance(item, MediaItem)] == [
        {"10": "10010"}.get(key, key) for key in taken
    ]
    assert Counter(item.reason for item in items if isinstance(item, Rejection)) == reasons


def test_fields_that_the_tar_lacks_come_from_the_parquet_beside_it(tmp_path: Path) -> None:
    keys = [f"{i:09d}" for i in range(40)]
    _write_tar(tmp_path / "0.tar", {f"{key}.jpg": _picture(int(key)) for key in keys})
    rows = {
        "key": keys[::-1],
        "caption": [f"no {i}" for i in range(40)][::-1],
        "similarity": [i / 40 for i in range(40)],
    }
    pq.write_table(pa.table(rows), tmp_path / "0.parquet", row_group_size=7)
    for glob in ("*.tar", "*"):  # it is read whether the glob names it or not, and never as pictures
        source = _source(tmp_path / glob, where="similarity < 0.5")
        units = group_files(source, find_files(source.path, "path"))
        assert [[file.key for file in unit] for unit in units] == [["0.tar", "0.parquet"]]
        items = list(read_images(source, units[0]))
        assert _told(items) == [
            (f"0.tar/{key}", f"no {i}" if i >= 20 else "filtered: where") for i, key in enumerate(keys)
        ]


def test_a_damaged_parquet_beside_a_tar_is_told_once(tmp_path: Path) -> None:
    _write_tar(tmp_path / "0.tar", {"a.jpg": _picture(), "a.txt": b"A.", "b.jpg": _picture(), "c.jpg": _picture()})
    (tmp_path / "0.parquet").write_bytes(b"PAR1 not at all PAR1")
    items = _all(_source(tmp_path / "*.tar"))
    assert _told(items) == [
        ("0.tar/a", "A."),
        ("0.tar/b", "no caption"),
        ("0.tar/c", "no caption"),
        ("0.parquet", "rest not read"),
    ]


def _link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"a.jpg": b"p"}, [("a", "no caption")]),
        ({"a.jpg": b"p", "a.txt": b" \n"}, [("a", "no caption")]),
        ({"a.jpg": b"p", "a.txt": b"", "a.json": b'{"TEXT": " From LAION. "}'}, [("a", "From LAION.")]),
        ({"a.JPG": b"p", "a.txt": "\ufeffÜ\n".encode()}, [("a", "Ü")]),
        ({"./d/a.jpg": b"p", "./d/a.txt": b"A"}, [("d/a", "A")]),
        ({"a.txt": b"A"}, [("a", "no picture")]),
        ({"a.jpg": b"", "a.txt": b"A"}, [("a", "no picture")]),
        ({"a.b.jpg": b"p", "a.txt": b"A"}, [("a", "no picture")]),  # of a.b.jpg the name is a, as in WebDataset
        ({"a.seg.png": b"s", "a.npy": b"n", "a.jpg": b"p", "a.txt": b"A"}, [("a", "A")]),
        ({"__offsets__": b"o", ".x.jpg": b"h", "a.jpg": b"p", "a.txt": b"A"}, [("a", "A")]),
        ({"a.jpg": b"p", "a.png": b"q", "a.txt": b"A"}, [("a", "duplicate key")]),
        (
            {"a.jpg": b"p", "b.jpg": b"p", "a.txt": b"A"},
            [("a", "no caption"), ("b", "no caption"), ("a", "duplicate key")],
        ),
        ({"a.jpg": b"p", "a.txt": b"\xff"}, [("a", "not UTF-8")]),
        ({"a.jpg": b"p", "a.json": b'{"caption": "\xff"}'}, [("a", "not UTF-8")]),
        ({"a.jpg": b"p", "a.json": b'{"caption": "\\ud800"}'}, [("a", "not UTF-8")]),
        ({"a.jpg": b"p", "a.txt": b"A", "a.json": b"{"}, [("a", "not JSON")]),
        ({"a.jpg": b"p", "a.txt": b"A", "a.json": b"[1]"}, [("a", "not JSON")]),
        ({"a.jpg": b"p", "a.txt": b"A", "a.json": b"[" * 100_000}, [("a", "not JSON")]),
        ({"a.jpg": b"p", "a.txt": b"A", "a.json": b" " * (1 << 20) + b"{}"}, [("a", "too large")]),
        ({"a.jpg": b"p", "a.txt": b"A" * 65_537}, [("a", "caption too long")]),
        ({"a.jpg": b"p", "a.json": json.dumps({"caption": "Ü" * 40_000}).encode()}, [("a", "caption too long")]),
        ({"a.jpg": _link("a.jpg", "/etc/passwd"), "a.txt": b"A"}, [("a", "not a plain file")]),
        ({"a.jpg": b"p", "a.txt": _link("a.txt", "../b")}, [("a", "not a plain file")]),
        ({"../a.jpg": b"p", "../a.txt": b"A", "b.jpg": b"p", "b.txt": b"B"}, [("../a", "unsafe name"), ("b", "B")]),
        ({"/a.jpg": b"p", "/a.txt": b"A"}, [("/a", "unsafe name")]),
        (
            {"a.jpg": b"p", "a.txt": b"A", "a.json": b'{"width": 1' + b"0" * 4000 + b', "height": 9}'},
            [("a", "A")],
        ),  # a number that no float holds
        ({}, []),
    ],
)
def test_each_record_of_a_tar_is_taken_or_told_once(
    tmp_path: Path, members: dict[str, Any], told: list[tuple[str, str]]
) -> None:
    items = _all(_source(_write_tar(tmp_path / "s.tar", members)))
    assert _told(items) == [(f"s.tar/{name}", what) for name, what in told]


def test_duplicate_keys_are_told_wherever_they_stand(tmp_path: Path) -> None:
    members = [(f"{i % 3}.{kind}", b"x") for i in range(4) for kind in ("jpg", "txt")]
    items = _all(_source(_write_tar(tmp_path / "s.tar", members)))
    assert _told(items) == [("s.tar/0", "x"), ("s.tar/1", "x"), ("s.tar/2", "x"), ("s.tar/0", "duplicate key")]


def test_of_a_tar_cut_anywhere_whole_records_are_taken_and_the_cut_told_once(tmp_path: Path) -> None:
    names = [f"{i}.{kind}" for i in range(3) for kind in ("jpg", "txt", "json")]
    whole = _write_tar(tmp_path / "w.tar", {name: b"{}" if name.endswith("json") else b"x" * 600 for name in names})
    data = whole.read_bytes()
    for cut in range(0, 9 * 1536 - 3 * 512, 256):
        (tmp_path / "s.tar").write_bytes(data[:cut])
        *items, last = _all(_source(tmp_path / "s.tar"))
        assert isinstance(last, Rejection) and (last.key, last.reason) == ("s.tar", "rest not read")
        record = 2 * 1536 + 1024  # a header and two blocks; a header and two blocks; a header and one block
        num_whole = (cut + 512 - 2) // record  # its last padding is not missed
        assert [item.key for item in items if isinstance(item, MediaItem)][:num_whole] == [
            f"s.tar/{i}" for i in range(num_whole)
        ]
        assert len(items) <= num_whole + 1 and Counter(type(item) for item in items)[Rejection] <= 1


def test_no_tar_is_damaged_not_fatal(tmp_path: Path) -> None:
    for content in (b"", b"text", bytes(range(256)) * 20):
        (tmp_path / "s.tar").write_bytes(content)
        (item,) = _all(_source(tmp_path / "s.tar"))
        assert isinstance(item, Rejection) and item.reason == "rest not read"


def test_a_packed_tar_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "s.tar.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match="got a packed tar; wanted"):
        _all(_source(tmp_path / "*"))


def test_pictures_in_parquet_are_taken_as_img2dataset_writes_them(tmp_path: Path) -> None:
    rows = [
        {"key": "07", "jpg": b"p", "txt": "A", "status": "success", "punsafe": 0.1},
        {"key": "08", "jpg": None, "txt": None, "status": "failed_to_download", "punsafe": 0.1},  # none to be had
        {"key": "09", "jpg": None, "txt": "C", "status": "success", "punsafe": 0.1},
        {"key": "07", "jpg": b"p", "txt": "D", "status": "success", "punsafe": 0.1},
        {"key": "08", "jpg": None, "txt": "C", "status": "queued", "punsafe": 0.1},  # another's field of this name
        {"key": "10", "jpg": b"q", "txt": "E", "status": "success", "punsafe": 0.9},
        {"key": "11", "jpg": b"q", "txt": "F", "status": "success", "punsafe": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "0.parquet", row_group_size=2)
    items = _all(_source(tmp_path / "*.parquet", where="punsafe < 0.5"))
    assert _told(items) == [
        ("0.parquet/07", "A"),
        ("0.parquet/09", "no picture"),
        ("0.parquet/07", "duplicate key"),
        ("0.parquet/08", "no picture"),
        ("0.parquet/10", "filtered: where"),
        ("0.parquet/11", "missing field"),
    ]
    assert isinstance(items[0], MediaItem) and items[0].data == b"p"


def test_pictures_of_a_datasets_folder_are_taken(tmp_path: Path) -> None:
    import datasets

    pictures = [Image.new("RGB", (5, 4), (10 * i, 0, 0)) for i in range(3)]
    data = datasets.Dataset.from_dict({"image": pictures, "text": ["A", "B", ""]})
    data.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "d")
    items = _all(_source(tmp_path / "d" / "*"))
    name = next((tmp_path / "d").glob("*.arrow")).name
    assert _told(items) == [(f"{name}/0", "A"), (f"{name}/1", "B"), (f"{name}/2", "no caption")]
    assert isinstance(items[1], MediaItem) and isinstance(items[1].data, bytes)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(items[1].data))), np.asarray(pictures[1]))


def _arrow(table: pa.Table, is_stream: bool) -> bytes:
    sink = pa.BufferOutputStream()
    with (pa.ipc.new_stream if is_stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("ending", ["stream.arrow", "file.arrow", "parquet"])
def test_damage_of_a_file_of_rows_is_told_after_what_is_whole(tmp_path: Path, ending: str) -> None:
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    captions = pa.concat_arrays([pa.array(["A", "B"]), bad, pa.array(["D"])])
    table = pa.table({"img": pa.array([b"p" * 999] * 4), "caption": captions})
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        pq.write_table(table, path, compression="none", use_dictionary=False)
    else:
        path.write_bytes(_arrow(table, ending.startswith("stream")))
    whole = [(f"{path.name}/{i}", what) for i, what in enumerate(["A", "B", "not UTF-8", "D"])]
    assert _told(_all(_source(path))) == whole
    data = path.read_bytes()
    for cut in range(0, len(data), 97):
        path.write_bytes(data[:cut])
        told = _told(_all(_source(path)))
        assert told[:-1] == whole[: len(told) - 1]
        assert told[-1][1] == "rest not read" or told == whole  # a stream without its end mark is whole


@pytest.mark.parametrize("ending", ["arrow", "parquet"])
def test_two_columns_of_one_name_are_told_where_one_of_them_is_asked_for(tmp_path: Path, ending: str) -> None:
    def told(names: list[str], **keys: Any) -> list[tuple[str, str]]:
        table = pa.table([pa.array([b"p"]), pa.array(["A"]), pa.array([7]), pa.array([8])], names=names)
        path = tmp_path / f"a.{ending}"
        if ending == "parquet":
            pq.write_table(table, path)
        else:
            path.write_bytes(_arrow(table, is_stream=True))
        return _told(_all(_source(path, **keys)))

    assert told(["jpg", "caption", "n", "n"]) == [(f"a.{ending}/0", "A")]
    assert told(["jpg", "caption", "n", "n"], where="n > 1") == [(f"a.{ending}/0", "wrong field")]
    assert told(["jpg", "caption", "n", "caption"]) == [(f"a.{ending}/0", "wrong field")]
    assert told(["jpg", "caption", "key", "key"]) == [(f"a.{ending}/0", "wrong field")]


def test_two_columns_of_pictures_of_one_name_are_no_pictures(tmp_path: Path) -> None:
    table = pa.table([pa.array([b"p"]), pa.array([b"q"]), pa.array(["A"])], names=["jpg", "jpg", "caption"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert _told(_all(_source(tmp_path / "*.parquet"))) == [("a.parquet", "no picture")]


def test_names_of_columns_that_are_not_utf_8_are_damage(tmp_path: Path) -> None:
    data = _arrow(pa.table({"jpg": [b"p"], "caption": ["A"], "abcd": [1]}), is_stream=True)
    (tmp_path / "a.arrow").write_bytes(data.replace(b"abcd", b"\xff\xfecd"))
    assert _told(_all(_source(tmp_path / "*.arrow"))) == [("a.arrow:0", "rest not read")]
    _write_tar(tmp_path / "0.tar", {"a.jpg": b"p", "b.jpg": b"p", "b.txt": b"B"})
    pq.write_table(pa.table({"key": ["a"], "caption": ["A"], "abcd": [1]}), tmp_path / "0.parquet", store_schema=False)
    (tmp_path / "0.parquet").write_bytes((tmp_path / "0.parquet").read_bytes().replace(b"abcd", b"\xff\xfecd"))
    assert _told(_all(_source(tmp_path / "*.tar"))) == [
        ("0.tar/a", "no caption"),
        ("0.tar/b", "B"),
        ("0.parquet", "rest not read"),
    ]


FAR = [
    pa.array([10**13, 0], pa.timestamp("s")),
    pa.array([10**9, 0], pa.date32()),
    pa.array([10**18, 0], pa.duration("s")),
]


@pytest.mark.parametrize("column", FAR, ids=lambda column: str(column.type))
def test_a_value_that_python_has_none_of_costs_one_record(tmp_path: Path, column: pa.Array) -> None:
    rows = {"key": ["a", "b"], "jpg": [b"p", b"p"], "caption": ["A", "B"], "day": column}
    pq.write_table(pa.table(rows), tmp_path / "0.parquet")
    told = [("a", "wrong field"), ("b", "B")]
    items = _all(_source(tmp_path / "*.parquet", where="day == day"))
    assert _told(items) == [(f"0.parquet/{key}", what) for key, what in told]
    assert isinstance(items[0], Rejection) and items[0].detail.startswith("day: ")
    _write_tar(tmp_path / "0.tar", {"a.jpg": b"p", "b.jpg": b"p"})
    assert _told(_all(_source(tmp_path / "*.tar", where="day == day"))) == [(f"0.tar/{k}", what) for k, what in told]


def test_rows_without_pictures_are_told_once_for_the_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["a", "b"], "caption": ["A", "B"]}), tmp_path / "a.parquet")
    (item,) = _all(_source(tmp_path / "*.parquet"))
    assert isinstance(item, Rejection)
    assert (item.key, item.reason) == ("a.parquet", "no picture") and "url, caption" in item.detail


def test_loose_pictures_take_what_lies_beside_them_once(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, content in {
        "cat.jpg": b"p",
        "cat.txt": b"A cat.",
        "cat.json": b'{"width": 100, "height": 90}',
        "cat.png": b"q",
        "sub/IMG.1.jpeg": b"r",
        "sub/IMG.1.json": b'{"caption": "A dog.", "width": 300, "height": 300}',
        "alone.webp": b"s",
        "lost.txt": b"Words.",
        "lost.json": b"{}",
        "x.heic": b"t",
        "00000_stats.json": b"{}",
    }.items():
        (tmp_path / name).write_bytes(content)
    told = [
        ("alone.webp", "no caption"),
        ("cat.jpg", "A cat."),
        ("cat.png", "A cat."),
        ("lost.json", "no picture"),
        ("sub/IMG.1.jpeg", "A dog."),
        ("x.heic", "no picture"),
    ]
    items = _all(_source(tmp_path / "**"))
    assert sorted(_told(items)) == told
    assert all(item.data == str(tmp_path / item.key) for item in items if isinstance(item, MediaItem))
    pictures = [entry for entry in told if entry[0] not in ("lost.json", "x.heic")]
    by_name = [item for kind in ("jpg", "png", "jpeg", "webp") for item in _all(_source(tmp_path / f"**/*.{kind}"))]
    assert sorted(key.rsplit("/")[-1] for key, _ in _told(by_name)) == sorted(k.rsplit("/")[-1] for k, _ in pictures)
    sized = {item.key: item for item in _all(_source(tmp_path / "**", min_size=200)) if isinstance(item, MediaItem)}
    assert list(sized) == ["sub/IMG.1.jpeg"]


def test_endings_of_any_case_belong_to_their_picture(tmp_path: Path) -> None:
    for name, content in {
        "UP.JPG": b"p",
        "UP.TXT": b"Loud.",
        "UP.Json": b'{"width": 300, "height": 300}',
        "both.png": b"q",
        "both.TXT": b"No.",
        "both.txt": b"Yes.",
        "new.avif": b"r",
        "new.txt": b"New.",
    }.items():
        (tmp_path / name).write_bytes(content)
    told = [("UP.JPG", "Loud."), ("both.png", "Yes."), ("new.avif", "New.")]
    items = _all(_source(tmp_path / "*", min_size=200))
    assert sorted(_told(items)) == told
    assert [item.min_size for item in items if isinstance(item, MediaItem) and item.key == "UP.JPG"] == [0]
    assert [told for kind in ("JPG", "png", "avif") for told in _told(_all(_source(tmp_path / f"*.{kind}")))] == told


def test_a_loose_picture_is_bounded_before_it_is_read(tmp_path: Path) -> None:
    for name, size in (("a", PICTURE.max_bytes + 1), ("b", PICTURE.max_bytes)):
        (tmp_path / f"{name}.txt").write_text(name)
        with (tmp_path / f"{name}.jpg").open("wb") as file:
            file.truncate(size)  # a hole, of no bytes on the disk
    assert _told(_all(_source(tmp_path / "*.jpg"))) == [("a.jpg", "too large"), ("b.jpg", "b")]


def test_a_size_that_nobody_noted_is_left_to_decoding(tmp_path: Path) -> None:
    _write_tar(tmp_path / "s.tar", {"a.jpg": b"p", "a.txt": b"A", "a.json": b'{"width": 100, "height": null}'})
    (item,) = _all(_source(tmp_path / "s.tar", min_size=50))
    assert isinstance(item, MediaItem) and item.min_size == 50


def test_loose_pictures_are_units_of_some_hundred_and_a_new_one_changes_one(tmp_path: Path) -> None:
    for i in range(3000):
        (tmp_path / f"{i:05d}.png").touch()
        (tmp_path / f"{i:05d}.txt").touch()
    source = _source(tmp_path / "*.png")
    units = group_files(source, find_files(source.path, "path"))
    assert 5 <= len(units) <= 30 and max(map(len, units)) <= 2 * 4 * 256
    assert sorted(file.key for unit in units for file in unit) == sorted(os.listdir(tmp_path))
    (tmp_path / "01500x.png").touch()
    after = group_files(source, find_files(source.path, "path"))
    assert len(set(units) - set(after)) == 1


def test_remote_tars_and_pictures_are_read_with_what_lies_beside_them() -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe({"/m/0.tar": SHARD.read_bytes(), "/m/0.parquet": SHARD.with_suffix(".parquet").read_bytes()})
    fs.pipe({"/m/d/cat.jpg": b"p", "/m/d/cat.txt": b"A cat."})
    source = _source("memory://m/*.tar")
    (unit,) = group_files(source, find_files(source.path, "path"))
    assert [file.key for file in unit] == ["0.tar", "0.parquet"]
    assert len([item for item in read_images(source, unit) if isinstance(item, MediaItem)]) == 3
    (item,) = _all(_source("memory://m/d/*.jpg"))
    assert isinstance(item, MediaItem) and (item.data, item.caption) == (b"p", "A cat.")


def test_seen_keys_are_a_set() -> None:
    seen = SeenKeys()
    num_keys = 3 * RECENT + 5
    assert all(seen.add(str(i)) for i in range(num_keys))
    assert not any(seen.add(str(i)) for i in range(0, num_keys, 97))
    assert seen.add("new")


def test_keyed_rows_are_found_in_any_order_and_a_file_without_keys_has_none(tmp_path: Path) -> None:
    table = pa.table({"key": [str(i) for i in range(50)], "n": range(50)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=8)
    rows = KeyedRows(InputFile(str(tmp_path / "a.parquet"), "a.parquet"))
    assert [rows.value(str(i), "n") for i in (49, 0, 17, 16, 50)] == [49, 0, 17, 16, None]
    assert rows.value("3", "absent") is None and rows.rejection is None
    pq.write_table(table.drop(["key"]), tmp_path / "b.parquet")
    rows = KeyedRows(InputFile(str(tmp_path / "b.parquet"), "b.parquet"))
    assert rows.value("3", "n") is None and rows.rejection is None


def test_orders_are_drawn_alike_everywhere_and_are_about_half() -> None:
    keys = [f"00000.tar/{i:09d}" for i in range(4000)]
    drawn = [is_text_first("random", 1, "photos", key) for key in keys]
    assert drawn == [is_text_first("random", 1, "photos", key) for key in keys]
    assert 1850 < sum(drawn) < 2150  # 5 standard deviations are 158
    for seed, name in ((2, "photos"), (1, "clips")):  # another draw, and independent of the first
        other = [is_text_first("random", seed, name, key) for key in keys]
        assert 1850 < sum(a == b for a, b in zip(drawn, other, strict=True)) < 2150
    assert all(is_text_first("text-first", 1, "photos", key) for key in keys[:50])
    assert not any(is_text_first("vision-first", 1, "photos", key) for key in keys[:50])
    # Written down, since datasets that were built must come out again.
    assert [is_text_first("random", 0, "photos", f"a.tar/{i}") for i in range(8)] == FIRST_EIGHT


FIRST_EIGHT = [False, False, False, True, True, True, True, True]


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("train", ["both", "last"])
def test_runs_are_bos_the_two_sides_in_order_and_eos(
    demo_tokenizer: TextTokenizer, text_first: bool, train: Any
) -> None:
    codes = np.arange(512, dtype=np.int32).reshape(2, 256)
    runs = media_runs(demo_tokenizer, "A cat.", codes, text_first, train)
    text = demo_tokenizer.encode("A cat.").tolist()
    start, end = demo_tokenizer.vision_start.tolist(), demo_tokenizer.vision_end.tolist()
    vision = [*start, *range(256), 8192, *range(256, 512), EOV, *end]
    sides = [text, vision] if text_first else [vision, text]
    assert [int(token) for run in runs for token in run.tokens] == [
        demo_tokenizer.bos,
        *sides[0],
        *sides[1],
        demo_tokenizer.eos,
    ]
    trained = [False] + [train == "both"] * len(sides[0]) + [True] * len(sides[1]) + [True]
    assert [run.trained for run in runs for _ in run.tokens] == trained
    is_vision = [run.is_vision for run in runs for _ in run.tokens]
    assert sum(is_vision) == 514 and is_vision.index(True) == 1 + len(start) + (len(text) if text_first else 0)


def test_fields_are_the_first_that_is_not_null() -> None:
    fields = Fields({"a": 1, "b": None}, lambda name: {"a": 5, "b": 2}.get(name))
    assert (fields["a"], fields["b"], fields.find("c")) == (1, 2, None)
    with pytest.raises(KeyError):
        fields["c"]
    item = admit(_source(where="b == 2"), "k", b"p", Fields({"caption": "A", "b": 2}))
    assert isinstance(item, MediaItem)
