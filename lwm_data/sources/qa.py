"""Questions about books: a long stretch of a book is read, then its questions are asked; only answers are trained.

<s> You are a ... USER: CHAPTER 3 ... It was Ben Gunn who hid it. ... Who hid the gold? ASSISTANT: Ben Gunn. </s>
|------------------------------ not trained ------------------------------------------| |----- trained ----|
USER: Where is the map? ASSISTANT: In the chest. </s>
|------ not trained ------------| |--- trained ----|

The context is a slice of the book's own ids. Chunks are found in it by their characters, whatever tokenizer they were
cut by. An example's key says what was read and asked, and where the evidence stands in the example:

moby_dick.txt:0-31850 0.1@2%:12-961 14.0@46%:13911-14880      tokens 0 to 31850 of the book; of chunk 0 its pair 1,
                                                              whose chunk is tokens 12 to 961 of the example
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from jaxtyping import Int32, Int64

from lwm_data.format.example import text_runs
from lwm_data.format.prompt import BORDER, SYSTEM
from lwm_data.format.vocab import TextTokenizer
from lwm_data.manifest_sources import Qa
from lwm_data.sources.files import InputFile, check_unchanged, find_files, read_text
from lwm_data.sources.heldout import other_side
from lwm_data.sources.qa_pairs import QaPair, pairs_of
from lwm_data.sources.qa_windows import Evidence, Window, depth_of, plan_windows
from lwm_data.sources.record import Record, Rejection
from lwm_data.sources.token_starts import encode_with_starts, floor_token

VERSION = 2  # raise it when the same inputs give other tokens
OPTIONS = {
    "name",
    "tokens",
    "join",
    "order",
    "depth",
    "questions",
    "max_trained",
    "repeat",
    "split",
}  # that tokens depend on
STRETCH = 1000  # tokens between the borders of text without pairs
ASKED = re.compile(r" (\d+\.\d+)@(\d+)%:(\d+)-(\d+)")
ALL_ASKED = re.compile(rf"(?:{ASKED.pattern})+(?: #\d+)?$")


@dataclass(frozen=True)
class Asked:
    """One question of an example, in turn. pair: its chunk's number, and which of the chunk's pairs it is.

    depth: of the middle of the evidence in the context that is read before the question, 0 to 1, in hundredths.
    start, stop: the evidence, in tokens of the example.
    """

    pair: str
    depth: float
    start: int
    stop: int


def asked_of(key: str) -> tuple[Asked, ...]:
    """What the example of this key asks; nothing where it is no key of a `qa` source."""
    all_asked = ALL_ASKED.search(key)
    found = ASKED.findall(all_asked[0]) if all_asked else []
    return tuple(Asked(pair, int(depth) / 100, int(start), int(stop)) for pair, depth, start, stop in found)


def group_books(source: Qa, pairs: list[InputFile]) -> list[tuple[InputFile, ...]]:
    """The input of each unit: the files of pairs and `join` books; of the last one, the files of pairs alone."""
    found = find_files(source.books, f"sources: {source.name}: books")
    books = [book for book in found if other_side(source.split, book.key) is None]
    groups = [(*pairs, *books[at : at + source.join]) for at in range(0, len(books), source.join)]
    return [*groups, tuple(pairs)]


def pairs_digest(pairs: Sequence[InputFile], books: Sequence[InputFile]) -> list[str]:
    """What the pairs are that a unit depends on. Files that are not hashed are not read."""
    if not all(file.sha256 for file in pairs):
        return []
    by_book = pairs_of(tuple(pairs))
    return [by_book.digest(book.key) for book in books] if books else [by_book.rest_digest()]


def read_qa(
    source: Qa, seed: int, pairs: tuple[InputFile, ...], books: tuple[InputFile, ...], tokenizer: TextTokenizer
) -> Iterator[Record | Rejection]:
    """The examples about `books`, read end to end, and their pairs that cannot be asked; without books, the rest."""
    if not books:
        found = find_files(source.books, f"sources: {source.name}: books")
        yield from pairs_of(pairs).rest({book.key for book in found})
        for book in found:
            filtered = other_side(source.split, book.key)
            if filtered is not None:
                yield filtered
        return
    reading = _Reading(tokenizer)
    for book in books:
        yield from reading.add(book, pairs_of(pairs)[book.key])
    if not reading.pairs:
        for book in books:
            yield Rejection(book.key, "filtered: no pairs", "none is about it, or none can be used")
        return
    asked: set[int] = set()
    left: dict[int, str] = {}
    for turn in range(source.repeat):
        rng = Random(f"{seed}/{source.name}/{books[0].key}/{turn}")
        windows, unasked = plan_windows(reading.borders(), reading.evidence, source, reading.frame, rng)
        for window in windows:
            asked |= {number for number, _ in window.asked}
            yield reading.record(window, turn)
        left |= unasked
    for number in sorted(left.keys() - asked):
        of = reading.evidence[number]
        detail = (
            f"its chunk takes {of.stop - of.start:,} tokens, asking {of.num_tokens:,}, its answer {of.num_trained:,}"
        )
        yield Rejection(reading.pairs[number].id, left[number], detail)


class _Reading:
    """Books end to end, and the pairs about them.

    pairs, evidence: of each pair that can be asked. frame: tokens of an example besides its context and its pairs.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.pairs: list[QaPair] = []
        self.evidence: list[Evidence] = []
        self._labels: list[str] = []
        self._tokenizer = tokenizer
        self._system, self._user = tokenizer.encode(f"{SYSTEM} USER:"), tokenizer.encode("USER:")
        self.frame = 1 + len(self._system) - len(self._user)
        self._books: list[tuple[str, int]] = []  # with its first token
        self._ids: Int32[np.ndarray, " n"] = np.zeros(0, np.int32)
        self._borders: list[Int64[np.ndarray, " n"]] = [np.zeros(1, np.int64)]

    def borders(self) -> Int64[np.ndarray, " n"]:
        """Where a context may begin and end: chunks do, and between them sentences."""
        return np.unique(np.concatenate(self._borders))

    def add(self, book: InputFile, pairs: Iterator[QaPair]) -> Iterator[Rejection]:
        """Read `book` after those before it; yields what of it, or of its pairs, cannot be used."""
        try:
            text = read_text(book.path)
        except ValueError as error:
            yield Rejection(book.key, *error.args)
            for pair in pairs:
                yield Rejection(pair.id, "unreadable book", f"{book.key}: {error.args[0]}")
            return
        check_unchanged(book)
        ids, starts = encode_with_starts(text, self._tokenizer)
        first = len(self._ids)
        seen: set[QaPair] = set()
        num_of: dict[int, int] = {}
        for pair in pairs:
            label = f"{pair.chunk}.{num_of.setdefault(pair.chunk, 0)}"
            num_of[pair.chunk] += 1
            rejection = _wrong(pair, book, text)
            if rejection is None and pair in seen:
                rejection = Rejection(pair.id, "pair given twice", "the same id, words and chunk")
            if rejection is not None:
                yield rejection
                continue
            seen.add(pair)
            num_trained = len(self._tokenizer.encode(pair.answer)) + 1
            num_tokens = len(self._user) + len(self._question(pair)) + num_trained
            begin, end = first + floor_token(starts, pair.start), first + int(np.searchsorted(starts, pair.stop))
            self.pairs.append(pair)
            self.evidence.append(Evidence(begin, end, num_tokens, num_trained))
            self._labels.append(label)
        chunks = {place for pair in seen for place in (pair.start, pair.stop)}
        known = sorted({0, len(ids)} | {floor_token(starts, place) for place in chunks})
        self._borders.append(first + np.array(_with_stretches(text, starts, known), np.int64))
        self._books.append((book.key, first))
        self._ids = np.concatenate([self._ids, ids])

    def record(self, window: Window, turn: int) -> Record:
        """The example of `window`. turn: how often all pairs were asked before."""
        parts: list[tuple[Int32[np.ndarray, " n"], bool]] = [(self._system, False)]
        at = window.start
        placed = 1 + len(self._system) - window.start  # from tokens of the books to tokens of the example
        inserted: list[tuple[int, int]] = []
        for i, (number, place) in enumerate(window.asked):
            if i:
                parts.append((self._user, False))
            parts.append((self._ids[at:place], False))
            parts.append((self._question(self.pairs[number]), False))
            parts.append((self._tokenizer.encode(self.pairs[number].answer), True))
            parts.append((np.array([self._tokenizer.eos], np.int32), True))
            at = place
            inserted.append((place, self.evidence[number].num_tokens))
        key = self._stretch(window) + "".join(
            f" {self._labels[number]}@{int(100 * depth_of(window, self.evidence[number], place))}%:"
            f"{_shifted(self.evidence[number].start, inserted, True) + placed}-"
            f"{_shifted(self.evidence[number].stop, inserted, False) + placed}"
            for number, place in window.asked
        )
        runs = text_runs(self._tokenizer, _merged(parts), eos=False)
        return Record(f"{key} #{turn}" if turn else key, runs)

    def _question(self, pair: QaPair) -> Int32[np.ndarray, " n"]:
        return self._tokenizer.encode(f"{pair.question} ASSISTANT:")

    def _stretch(self, window: Window) -> str:
        """What is read: books, each with its tokens."""
        ends = [first for _, first in self._books[1:]] + [len(self._ids)]
        return "+".join(
            f"{key}:{max(window.start, first) - first}-{min(window.stop, end) - first}"
            for (key, first), end in zip(self._books, ends, strict=True)
            if first < window.stop and end > window.start
        )


def _wrong(pair: QaPair, book: InputFile, text: str) -> Rejection | None:
    """Why the pair is not about this text."""
    if pair.book_sha256 != book.sha256:
        detail = f"{book.key} has sha256 {book.sha256[:12]}..., the pair is of {pair.book_sha256[:12]}..."
        return Rejection(pair.id, "other book", f"{detail}; name the file it was made from, or make pairs anew")
    found = text[pair.start : pair.stop].encode() if pair.stop <= len(text) else b""
    if not found or hashlib.sha256(found).hexdigest() != pair.chunk_sha256:
        return Rejection(pair.id, "other chunk", f"characters {pair.start:,} to {pair.stop:,} are not what it says")
    return None


def _with_stretches(text: str, starts: Int64[np.ndarray, " n"], borders: list[int]) -> list[int]:
    """`borders`, and ends of sentences where they lie far apart."""
    found = list(borders)
    for begin, end in itertools.pairwise(borders):
        for token in range(begin + STRETCH, end - STRETCH // 2, STRETCH):
            border = BORDER.search(text, int(starts[token]))
            place = floor_token(starts, border.end()) if border else end
            found.append(place if place < end else token)
    return found


def _shifted(token: int, inserted: Sequence[tuple[int, int]], is_start: bool) -> int:
    """Where token `token` of the books stands once questions are inserted: (the token before which, their tokens)."""
    return token + sum(size for place, size in inserted if place < token or (is_start and place == token))


def _merged(parts: list[tuple[Int32[np.ndarray, " n"], bool]]) -> list[tuple[Int32[np.ndarray, " n"], bool]]:
    """`parts` with neighbours that are not trained joined."""
    merged: list[tuple[Int32[np.ndarray, " n"], bool]] = []
    for ids, trained in parts:
        if merged and not trained and not merged[-1][1]:
            merged[-1] = (np.concatenate([merged[-1][0], ids]), False)
        else:
            merged.append((ids, trained))
    return merged
