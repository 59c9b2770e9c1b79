"""Broken tars, clips and files of rows through a whole build: each counted with its reason, and what is whole is kept.

Broken pictures and videos by themselves are in test_build_vision.py.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lwm_data.build import BuildResult, build
from lwm_data.check import check_dataset
from lwm_data.format.dataset import open_dataset
from tests.lwm_data.vision.videos import write_audio, write_video
from tests.tiny_vision import write_tiny_tokenizer

EMPTY = write_video([], options={"movflags": "empty_moov+frag_keyframe"})


@pytest.fixture
def build_of(project: Callable[..., Path]) -> Callable[..., BuildResult]:
    """build_of(folder, type=..., key=value) builds one source of all files in `folder`, however many are bad."""

    def make(folder: Path, **keys: Any) -> BuildResult:
        source = {"name": "media", "path": f"{folder}/*"} | keys
        manifest = project(sources=[source], row_length=1024, vision_tokenizer="tiny.yaml", max_rejected=1)
        write_tiny_tokenizer(manifest.parent / "tiny.yaml")
        return build(manifest)

    return make


def _kept(result: BuildResult) -> list[str]:
    """The keys of the examples of the dataset, which is whole."""
    assert check_dataset(open_dataset(result.out), lambda _: None) == []
    tables = [pq.read_table(path) for path in sorted(result.out.glob("shard-*.examples.parquet"))]
    return sorted(pa.concat_tables(tables).column("key").to_pylist())


def _rejected(result: BuildResult) -> dict[str, str]:
    """Key -> reason."""
    lines = [json.loads(line) for line in (result.out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {line["key"]: line["reason"] for line in lines}
    assert len(found) == len(lines) == result.info.sources["media"].rejected
    assert all(line["detail"] for line in lines)
    return found


def _picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 24), (shade, 99, 3)).save(file, "JPEG")
    return file.getvalue()


def _tar(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _pair(key: str, shade: int) -> list[tuple[str | tarfile.TarInfo, bytes]]:
    return [(f"{key}.jpg", _picture(shade)), (f"{key}.txt", key.encode())]


def test_broken_tars_cost_what_is_broken_in_them(build_of: Callable[..., BuildResult], tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    link, huge = tarfile.TarInfo("link.jpg"), tarfile.TarInfo("huge.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    huge.pax_headers = {"size": "9" * 5000}
    _tar(
        folder / "0.tar",
        [
            *_pair("a", 0),
            ("wordless.jpg", _picture(1)),
            (link, b""),
            ("link.txt", b"A link."),
            *_pair("../out", 2),
            *_pair("b", 3),
            *_pair("a", 4),
            *_pair("c", 5),
        ],
    )
    _tar(folder / "huge.tar", [*_pair("a", 6), (huge, b""), *_pair("lost", 7)])
    cut = _tar(folder / "cut.tar", [*_pair("a", 8), *_pair("b", 9), *_pair("c", 10)])
    data = cut.read_bytes()
    cut.write_bytes(data[: data.index(b"b.jpg") + 700])  # within the pixels of b
    result = build_of(folder, type="images")
    assert _kept(result) == ["0.tar/a", "0.tar/b", "0.tar/c", "cut.tar/a", "huge.tar/a"]
    assert _rejected(result) == {
        "0.tar/wordless": "no caption",
        "0.tar/link": "not a plain file",
        "0.tar/../out": "unsafe name",
        "0.tar/a": "duplicate key",
        "huge.tar": "rest not read",
        "cut.tar": "rest not read",
    }


def test_broken_files_of_rows_cost_what_is_broken_in_them(build_of: Callable[..., BuildResult], tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    pictures, captions = pa.array([_picture(0), _picture(1)]), pa.array(["A", "B"])
    days = pa.array([0, 10**13], pa.timestamp("s"))
    pq.write_table(pa.table({"jpg": pictures, "caption": captions, "day": days}), folder / "far.parquet")
    twice = pa.table([pictures, captions, captions, days], names=["jpg", "caption", "caption", "day"])
    pq.write_table(twice, folder / "twice.parquet")
    with pa.ipc.new_stream(folder / "name.arrow", pa.schema([("jpg", pa.binary()), ("abcd", pa.string())])) as writer:
        writer.write_batch(pa.record_batch([pictures, captions], names=["jpg", "abcd"]))
    (folder / "name.arrow").write_bytes((folder / "name.arrow").read_bytes().replace(b"abcd", b"\xff\xfecd"))
    result = build_of(folder, type="images", where="day == day")
    assert _kept(result) == ["far.parquet/0"]
    assert _rejected(result) == {
        "far.parquet/1": "wrong field",
        "twice.parquet/0": "wrong field",
        "twice.parquet/1": "wrong field",
        "name.arrow:0": "rest not read",
    }


def test_clips_without_frames_are_told_and_one_frame_is_enough(
    build_of: Callable[..., BuildResult], tmp_path: Path
) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    clips = {"audio": write_audio(), "empty": EMPTY, "one": write_video([0]), "two": write_video([0, 900])}
    members: list[tuple[str | tarfile.TarInfo, bytes]] = []
    for name, data in clips.items():
        (folder / f"{name}.mp4").write_bytes(data)
        (folder / f"{name}.txt").write_text(name)
        members += [(f"{name}.mp4", data), (f"{name}.txt", name.encode())]
    _tar(folder / "0.tar", members)
    result = build_of(folder, type="videos", fps=2, max_frames=4)
    assert _kept(result) == ["0.tar/one", "0.tar/two", "one.mp4", "two.mp4"]
    assert _rejected(result) == {
        "0.tar/audio": "no video",
        "0.tar/empty": "no frames",
        "audio.mp4": "no video",
        "empty.mp4": "no frames",
    }
