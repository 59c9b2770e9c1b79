"""Memory does not grow with the input: a text of 5 GB, a tar of many members, many files. Peaks of child processes."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import zstandard

ROOT = Path(__file__).parents[2]

PEAK = """
import resource, sys
from lwm_data.format.vocab import load_text_tokenizer
from lwm_data.manifest_sources import Books, Chats, Text, Tokens
from lwm_data.sources.books import read_book
from lwm_data.sources.chats import read_chats
from lwm_data.sources.files import InputFile, find_files
from lwm_data.sources.record import Rejection
from lwm_data.sources.text import group_texts, read_texts
from lwm_data.sources.tokens import read_tokens

tokenizer = load_text_tokenizer("tokenizers/demo-text.yaml")
path = sys.argv[1]
file = InputFile(path, path.rpartition("/")[2])
keys = {"name": "s", "path": "x"}
read = {
    "books": lambda: read_book(Books(type="books", **keys), file, tokenizer),
    "lines": lambda: read_texts(Text(type="text", records="lines", **keys), file, tokenizer),
    "text": lambda: read_texts(Text(type="text", **keys), file, tokenizer),
    "chats": lambda: read_chats(Chats(type="chats", **keys), file, tokenizer),
    "tokens": lambda: read_tokens(Tokens(type="tokens", **keys), file, tokenizer),
    "find": lambda: group_texts(Text(type="text", **keys), find_files(path + "/*.txt", "path")),
}[sys.argv[2]]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[2] == "find":
    found = read()
    print("files", sum(map(len, found)), end=" ")
else:
    counted = {}
    for record in read():
        reason = record.reason if isinstance(record, Rejection) else "kept"
        counted[reason] = counted.get(reason, 0) + 1
    print(*(f"{reason.replace(' ', '-')} {count}" for reason, count in counted.items()), end=" ")
print("grew", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def _peak(path: Path, what: str) -> tuple[str, int]:
    """What was found, and by how many bytes the reading raised the process's peak."""
    command = [sys.executable, "-c", PEAK, str(path), what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told, _, grew = done.stdout.strip().rpartition(" grew ")
    return told, int(grew) << 10


def _repeated(path: Path, start: bytes, unit: bytes, count: int, end: bytes) -> Path:
    """A .zst of `count` times `unit`; frames of 128 MB that are the same, so that it is written at once."""
    pack = zstandard.ZstdCompressor(level=1).compress
    block = pack(unit * (count // 40))
    path.write_bytes(pack(start) + block * 40 + pack(end))
    return path


@pytest.mark.parametrize(
    ("name", "what", "start", "unit", "end"),
    [
        ("a.txt.zst", "books", b"", b"word ", b""),
        ("a.jsonl.zst", "text", b'{"text": "first"}\n{"text": "', b"word ", b'"}\n{"text": "last"}\n'),
        ("a.json.zst", "chats", b'[{"data": ["a", "b"]}, {"data": ["', b"word ", b'"]}]'),
    ],
)
def test_a_text_of_5_gb_in_one_line_is_a_rejection_and_not_memory(
    tmp_path: Path, name: str, what: str, start: bytes, unit: bytes, end: bytes
) -> None:
    size = 5 << 30 if what == "text" else 1 << 30  # the others stop where it is too large
    path = _repeated(tmp_path / name, start, unit, size // len(unit), end)
    assert path.stat().st_size < 1 << 20
    told, grew = _peak(path, what)
    assert told == {"books": "too-large 1", "text": "kept 2 too-large 1", "chats": "kept 1 rest-not-read 1"}[what]
    assert grew < 500 << 20


def test_a_tar_ten_times_as_long_takes_no_more_memory(tmp_path: Path) -> None:
    """Its keys are held as 8 bytes each, to tell those that come twice."""
    peaks = []
    for count in (2_000, 20_000):
        path = tmp_path / f"{count}.tar"
        header = tarfile.TarInfo()
        header.size = 5
        with path.open("wb") as file:
            for i in range(count):
                header.name = f"{i:08d}.txt"
                file.write(header.tobuf(tarfile.USTAR_FORMAT) + b"words".ljust(512, b"\0"))
            file.write(bytes(1024))
        told, grew = _peak(path, "text")
        assert told == f"kept {count}"
        peaks.append(grew)
    assert peaks[1] - peaks[0] < 18_000 * 100 + (4 << 20)


def test_a_file_that_is_found_takes_less_than_a_kilobyte(tmp_path: Path) -> None:
    peaks = []
    for count in (2_000, 22_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        for i in range(count):
            (folder / f"{i:08d}.txt").touch()
        told, grew = _peak(folder, "find")
        assert told == f"files {count}"
        peaks.append(grew)
    assert (peaks[1] - peaks[0]) / 20_000 < 1024
