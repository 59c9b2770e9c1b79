"""What ships under manifests/demo: credited, clean text, and held-out books apart from training."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import zstandard

DEMO = Path(__file__).parents[1] / "manifests" / "demo"
FILES = sorted(path for folder in ("novels", "heldout", "chats") for path in (DEMO / folder).iterdir())
NOVELS = [path for path in FILES if path.suffix == ".txt"]
CHATS = [path for path in FILES if path.name.endswith(".jsonl.zst")]
MEDIA = sorted(path for folder in ("photos", "clips") for path in (DEMO / folder).glob("*.tar"))
LICENCES = {
    "GPL-2.0": "GPL-2",
    "GPL-2.0-or-later": "GPL-2",
    "LGPL-3.0": "LGPL-3",
    "CC0": "CC0-1.0",
    "CC0-1.0": "CC0-1.0",
}
BY_ADDRESS = ("CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-4.0")
FREE = ("public domain", "public domain in the USA")


def _name(path: Path) -> str:
    return path.relative_to(DEMO).as_posix()


def _bytes(path: Path) -> bytes:
    """The file's content, decompressed."""
    if path.suffix != ".zst":
        return path.read_bytes()
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(path.read_bytes())) as reader:
        return reader.read()


def test_there_are_ten_novels_two_held_out_and_two_files_of_chats() -> None:
    folders = [path.parent.name for path in FILES]
    assert {folder: folders.count(folder) for folder in folders} == {"novels": 10, "heldout": 2, "chats": 2}
    assert set(NOVELS) | set(CHATS) == set(FILES)


def test_credits_name_every_shipped_file_once_and_no_other() -> None:
    credits = (DEMO / "CREDITS.md").read_text(encoding="utf-8")
    named = [line.split("`")[1] for line in credits.splitlines() if line.startswith("| `")]
    assert sorted(named) == [_name(path) for path in sorted(FILES, key=_name)]


def test_every_credit_has_title_author_source_licence_and_changes() -> None:
    credits = (DEMO / "CREDITS.md").read_text(encoding="utf-8")
    for line in credits.splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert len(cells) == 6 and all(cells), line
            assert cells[4] in ("public domain in the USA", "Apache-2.0"), line


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_every_file_is_utf8_without_bom_and_carriage_returns(path: Path) -> None:
    content = _bytes(path)
    assert not content.startswith(b"\xef\xbb\xbf")
    assert b"\r" not in content
    assert b"\x00" not in content
    content.decode("utf-8")


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_no_file_carries_the_distributor_s_name_or_licence(path: Path) -> None:
    content = _bytes(path).decode("utf-8").lower()
    assert "gutenberg" not in content


@pytest.mark.parametrize("path", NOVELS, ids=_name)
def test_a_novel_starts_and_ends_with_its_own_text(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").split("\n")
    assert lines[0].strip() and lines[-2].strip() and lines[-1] == ""
    edges = "\n".join(lines[:400] + lines[-40:])
    assert "Produced by" not in edges and "Transcriber" not in edges and "***" not in edges


def test_chats_are_dialogues_that_end_with_the_assistant() -> None:
    keys = []
    for path in CHATS:
        for line in _bytes(path).decode("utf-8").splitlines():
            record = json.loads(line)
            assert len(record["data"]) % 2 == 0 and all(turn.strip() for turn in record["data"])
            keys.append(record["id"])
    assert len(keys) == len(set(keys)) == 324


@pytest.mark.parametrize("path", MEDIA, ids=_name)
def test_every_photograph_and_clip_has_a_caption_a_credit_and_a_licence_whose_text_is_here(path: Path) -> None:
    with tarfile.open(path) as tar:
        names = tar.getnames()
    keys = sorted({name.partition(".")[0] for name in names})
    assert {f"{key}.txt" for key in keys} <= set(names)
    credits = (DEMO / "CREDITS.md").read_text(encoding="utf-8").splitlines()
    licence_of = {row["key"]: row["licence"] for row in pq.read_table(path.with_suffix(".parquet")).to_pylist()}
    assert sorted(licence_of) == keys
    for key in keys:
        (line,) = [line for line in credits if line.startswith(f"| {_name(path)} {key} |")]
        licence = licence_of[key].partition(" (")[0]
        assert licence in line
        if licence in LICENCES:
            assert (DEMO / "licences" / f"{LICENCES[licence]}.txt").stat().st_size > 1000
        else:
            assert licence in (*BY_ADDRESS, *FREE), licence
