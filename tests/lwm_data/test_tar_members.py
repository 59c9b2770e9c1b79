"""Tars are read as the standard library reads them, and whatever they hold, nothing but DamagedTar comes out."""

from __future__ import annotations

import io
import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_data.sources.tar_members import DamagedTar, Member, read_members

SHARD = Path(__file__).parent / "media" / "00000.tar"
LONG = "/".join(["folder" * 10] * 3) + "/ein langer Name – mit Ü.jpg"  # above the 100 bytes of a header


def _tar(members: list[tuple[str | tarfile.TarInfo, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def _read(data: bytes, limit: int | None = 1 << 30) -> tuple[list[Member], str | None]:
    """The members, and what is damaged after them."""
    members = []
    try:
        for member in read_members(io.BytesIO(data), lambda name: limit):
            members.append(member)
    except DamagedTar as error:
        return members, error.detail
    return members, None


def _link(name: str, kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["us", "gnu", "p"])
def test_names_and_data_are_those_that_the_standard_library_reads(form: int) -> None:
    parts = [("a.jpg", b"x" * 511), ("b.txt", b""), (LONG, b"y" * 512), ("d/./c.json", b"z" * 513)]
    data = _tar([("d", b""), *parts] if form != tarfile.USTAR_FORMAT else [("d", b""), *parts[:2], parts[3]], form)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        wanted = [(os.path.normpath(info.name), tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    members, problem = _read(data)
    assert [(member.name, member.data) for member in members] == wanted
    assert problem is None


def test_a_real_shard_is_what_the_standard_library_reads() -> None:
    with tarfile.open(SHARD) as tar:
        wanted = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    members, problem = _read(SHARD.read_bytes())
    assert [(member.name, member.data) for member in members] == wanted and problem is None


@given(cut=st.integers(0, 512 * 13))
def test_whole_members_before_a_cut_are_taken_and_the_cut_is_told(cut: int) -> None:
    parts = [("a.jpg", b"a" * 700), ("b.jpg", b"b" * 512), (LONG, b"c" * 3)]
    data = _tar(parts, tarfile.GNU_FORMAT)
    # a: header 0, data 512. b: 1536, 2048. The long name: 2560, 3072, then 3584, 4096. The end: 4608.
    ends = (512 + 700, 2048 + 512, 4096 + 3)
    members, problem = _read(data[:cut])
    whole = [data for (_, data), end in zip(parts, ends, strict=True) if end <= cut]
    assert [member.data for member in members] == whole
    assert (problem is None) == (cut >= 4608 + 512)


@given(at=st.integers(0, 6000), value=st.binary(min_size=1, max_size=40))
def test_no_damage_leads_to_any_other_error(at: int, value: bytes) -> None:
    data = bytearray(_tar([("a.jpg", b"a" * 700), (LONG, b"b"), (LONG + "x", b"c" * 600)], tarfile.PAX_FORMAT))
    data[at : at + len(value)] = value
    members, _ = _read(bytes(data))
    assert len(members) <= 3


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_what_is_no_plain_file_is_told_and_never_followed(kind: bytes) -> None:
    members, problem = _read(_tar([(_link("a.jpg", kind), b""), ("b.jpg", b"b")]))
    assert [(member.data, member.problem and member.problem[0]) for member in members] == [
        (None, "not a plain file"),
        (b"b", None),
    ]
    assert problem is None


@pytest.mark.parametrize("name", ["../a.jpg", "/a.jpg", "b/../../a.jpg", "b/..", "x" * 5000 + ".jpg"])
def test_names_that_leave_the_archive_or_never_end_are_told(name: str) -> None:
    (bad, good), problem = _read(_tar([(name, b"a"), ("b.jpg", b"b")], tarfile.PAX_FORMAT))
    assert bad.problem is not None and bad.problem[0] == "unsafe name" and bad.data is None
    assert (good.data, problem) == (b"b", None)


def test_a_member_is_bounded_before_memory_is_taken() -> None:
    huge = tarfile.TarInfo("a.jpg")
    huge.size = 1 << 40
    honest = _tar([("a.jpg", bytes(1 << 20)), ("b.jpg", b"b")])
    tracemalloc.start()
    try:
        members, problem = _read(huge.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
        assert members == [] and problem is not None and "cut within a.jpg" in problem
        members, problem = _read(honest, limit=1000)
        assert [member.problem and member.problem[0] for member in members] == ["too large", None]
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def test_a_name_cannot_ask_for_memory() -> None:
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 1 << 20
    _, problem = _read(name.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 21))
    assert problem is not None and "a name of 1,048,576 bytes" in problem


@pytest.mark.parametrize("digits", [21, 5000])
def test_a_size_of_any_number_of_digits_is_damage(digits: int) -> None:
    member = tarfile.TarInfo("b.jpg")
    member.pax_headers = {"size": "9" * digits}
    members, problem = _read(_tar([("a.jpg", b"a"), (member, b"b")], tarfile.PAX_FORMAT))
    assert [member.data for member in members] == [b"a"]
    assert problem == f"a pax header with a size of {digits:,} digits"


def test_a_second_archive_after_the_end_is_told() -> None:
    one = _tar([("a.jpg", b"a")])
    members, problem = _read(one + one)
    assert len(members) == 1 and problem is not None and "joined" in problem


def test_reading_members_takes_no_memory_that_grows_with_them() -> None:
    peaks = []
    for count in (500, 4000):
        data = io.BytesIO(_tar([(f"{i:06d}.txt", b"x") for i in range(count)]))
        tracemalloc.start()
        try:
            assert sum(1 for _ in read_members(data, lambda name: 10)) == count
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < peaks[0] + 20_000
