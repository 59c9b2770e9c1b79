"""Pairs of questions and answers, by the book they are about: read once, then a book's at a time.

qa.jsonl                     a.txt  b.txt  a.txt  ...          8 bytes of memory for each pair
a temporary file             what is needed of each, as it came
pairs_of(files)["a.txt"] ->  QaPair, QaPair                    one book's
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import weakref
from array import array
from collections.abc import Collection, Iterator
from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import Any, TypeGuard

from lwm_data.sources.files import InputFile, check_unchanged
from lwm_data.sources.json_lines import JsonLine, holds_half_a_pair
from lwm_data.sources.objects import read_objects
from lwm_data.sources.record import Rejection

FIELDS = {"id", "question", "answer", "book", "book_sha256", "chunk", "chars", "chunk_sha256"}
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class QaPair:
    """A question, its answer, and the chunk number `chunk` that proves it: text[start:stop] of the book.

    book_sha256: of the book's file. chunk_sha256: of the chunk's text in UTF-8.
    """

    id: str
    question: str
    answer: str
    book_sha256: str
    chunk: int
    start: int
    stop: int
    chunk_sha256: str


class PairsByBook:
    """The pairs of all `files`, and what in them is no pair."""

    def __init__(self, files: tuple[InputFile, ...]) -> None:
        self._lines = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as this object)
        weakref.finalize(self, self._lines.close)
        self._at: dict[str, array[int]] = {}
        self._broken = array("Q")
        self._digests: dict[str, Any] = {}
        self._digest = hashlib.sha256()
        for file in files:
            for found in read_objects(file, FIELDS):
                self._add(found if isinstance(found, Rejection) else _parsed(found))
            check_unchanged(file)

    def __getitem__(self, book: str) -> Iterator[QaPair]:
        """The pairs about `book`, in the files' order."""
        return (QaPair(*values) for values in self._read(self._at.get(book, array("Q"))))

    def digest(self, book: str) -> str:
        """Equal exactly when the pairs about `book` are, and their order."""
        return str(self._digests[book].hexdigest()) if book in self._digests else ""

    def rest_digest(self) -> str:
        """Equal exactly when the digests of all books are, and what is no pair."""
        return hashlib.sha256(
            json.dumps([self._digest.hexdigest(), *map(self.digest, sorted(self._at))]).encode()
        ).hexdigest()

    def rest(self, books: Collection[str]) -> Iterator[Rejection]:
        """What is no pair, and the pairs about other books than `books`."""
        for values in self._read(self._broken):
            yield Rejection(*values)
        for book in sorted(self._at.keys() - set(books)):
            for pair in self[book]:
                yield Rejection(
                    pair.id, "no such book", f"{book}: not among `books`, such as {min(books)}; name the same folder"
                )

    def _add(self, found: tuple[str, QaPair] | Rejection) -> None:
        line = json.dumps(astuple(found) if isinstance(found, Rejection) else astuple(found[1])).encode() + b"\n"
        if isinstance(found, Rejection):
            self._broken.append(self._lines.tell())
            self._digest.update(line)
        else:
            self._at.setdefault(found[0], array("Q")).append(self._lines.tell())
            self._digests.setdefault(found[0], hashlib.sha256()).update(line)
        self._lines.write(line)

    def _read(self, places: array[int]) -> Iterator[list[Any]]:
        for place in places:
            self._lines.seek(place)
            yield json.loads(self._lines.readline())


@lru_cache(maxsize=4)  # of so many sources
def pairs_of(files: tuple[InputFile, ...]) -> PairsByBook:
    """The pairs of hashed `files`. ValueError where one is not what was hashed."""
    return PairsByBook(files)


def _parsed(line: JsonLine) -> tuple[str, QaPair] | Rejection:
    """The book's key and the pair."""
    value = line.value
    if not isinstance(value, dict):
        return Rejection(
            line.key, "not an object", f"got {type(value).__name__}; wanted a pair as `lwm-data qa` writes"
        )
    named = value.get("id")
    key = named if isinstance(named, str) and named and not holds_half_a_pair(named) else line.key
    texts = []
    for name in ("question", "answer", "book", "book_sha256", "chunk_sha256"):
        text = value.get(name)
        if not isinstance(text, str) or not text.strip() or holds_half_a_pair(text):
            return Rejection(key, "broken pair", f"{name}: got {_shown(text)}; wanted a text")
        if name.endswith("_sha256") and not SHA256.fullmatch(text):
            return Rejection(key, "broken pair", f"{name}: got {_shown(text)}; wanted 64 hex digits")
        texts.append(text)
    question, answer, book, book_sha256, chunk_sha256 = texts
    chunk, span = value.get("chunk"), value.get("chars")
    if not _is_count(chunk):
        return Rejection(key, "broken pair", f"chunk: got {_shown(chunk)}; wanted its number, from 0")
    if not (isinstance(span, list) and len(span) == 2 and _is_count(span[0]) and _is_count(span[1])):
        return Rejection(key, "broken pair", f"chars: got {_shown(span)}; wanted [start, stop]")
    if span[0] >= span[1]:
        return Rejection(key, "broken pair", f"chars: got {_shown(span)}; wanted start < stop")
    return book, QaPair(key, question.strip(), answer.strip(), book_sha256, chunk, span[0], span[1], chunk_sha256)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40


def _shown(value: Any) -> str:
    return ascii(value)[:60]
