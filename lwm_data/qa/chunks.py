"""A book cut into chunks: consecutive, nothing lost, each at most so many of the whole book's own tokens.

text     It was late.\\n\\n  Nobody came. He slept at last.\\n\\n   THE END
borders              |p               |s                   |p             p: paragraph, s: sentence
tokens   0 1 2 3 4 5   6 7 8 9 ...
chunks   [-------------)[-------------------------------------)[--------)

A chunk ends at the last paragraph's border in its second half, else at the last sentence's border there, else at the
last sentence's at all, else (a sentence of more tokens than a chunk) at a word, else at a character. Only where a
token begins, so that a chunk's tokens are a slice of the book's.
"""

from __future__ import annotations

import bisect
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from lwm_data.format.vocab import TextTokenizer
from lwm_data.sources.token_starts import encode_with_starts

PARAGRAPH = re.compile(r"\n[ \t\r]*\n\s*")
SENTENCE = re.compile(r"[.!?\u2026][\"'\u2019\u201d\u00bb)\]_*]*(\s+)|[\u3002\uff01\uff1f][\u201d\u300d\u300f]*(\s*)")
WORD = re.compile(r"\s+")
# After these a point ends no sentence: titles, initials and the like of the languages that have prompts.
ABBREVIATION = re.compile(
    r"(?:\b(?:Mrs?|Ms|Dr|St|Prof|Capt|Col|Gen|Lieut|Lt|Rev|Hon|Esq|Jr|Sr|No|Vol|Chap|vs|etc|Hr|Fr|Nr|bzw|usw|Mme|Mlle"
    r"|Sra|Srta|Ud|Uds|MM)|(?<!\w)\w)$"
)


@dataclass(frozen=True, slots=True)
class Chunk:
    """number: from 0. text: text[start:stop] of the book, the span `chars`; `tokens` of the book's tokens."""

    number: int
    text: str
    chars: tuple[int, int]
    tokens: tuple[int, int]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


class Chunker:
    """Cuts texts by one tokenizer."""

    def __init__(self, tokenizer: TextTokenizer, chunk_tokens: int) -> None:
        self.chunk_tokens = chunk_tokens
        self._tokenizer = tokenizer

    def count(self, text: str) -> int:
        """Tokens of `text`."""
        return len(self._tokenizer.encode(text))

    def cut(self, text: str) -> Iterator[Chunk]:
        """The chunks of `text`, in order; together they are all of it."""
        _, starts = encode_with_starts(text, self._tokenizer)
        cuts = [0, *_cuts(text, starts, self.chunk_tokens), len(starts)]
        chars = [0, *(int(starts[cut]) for cut in cuts[1:-1]), len(text)]
        for number, (begin, end) in enumerate(zip(range(len(cuts)), range(1, len(cuts)), strict=False)):
            span = (chars[begin], chars[end])
            yield Chunk(number, text[span[0] : span[1]], span, (cuts[begin], cuts[end]))


def _cuts(text: str, starts: Int64[np.ndarray, " n"], most: int) -> Iterator[int]:
    """Tokens at which a new chunk begins, without 0."""
    # A token that begins where the one before it does is the rest of a character, or follows the tokenizer's own blank.
    opens = np.flatnonzero(np.diff(starts, prepend=-1) > 0)
    at = starts[opens]
    paragraphs = _tokens_at(opens, at, ((m.start(), m.end()) for m in PARAGRAPH.finditer(text)))
    sentences = _tokens_at(opens, at, _sentences(text))
    begin = 0
    while len(starts) - begin > most:
        end, half = begin + most, begin + most // 2
        cut = _last(paragraphs, half, end) or _last(sentences, half, end) or _last(sentences, begin, end)
        if cut is None:
            low, high = int(starts[begin]), int(starts[end])
            words = _tokens_at(
                opens, at, ((low + m.start(), low + m.end()) for m in WORD.finditer(text[low : high + 1]))
            )
            cut = _last(words, begin, end)
        if cut is None:
            place = int(np.searchsorted(opens, end, "right")) - 1
            cut = int(opens[place])
        assert begin < cut <= end
        yield cut
        begin = cut


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    """The blanks after each sentence: where they start and stop."""
    for match in SENTENCE.finditer(text):
        if text[match.start()] == "." and ABBREVIATION.search(text, max(0, match.start() - 8), match.start()):
            continue
        yield match.span(1 if match[1] is not None else 2)


def _tokens_at(
    opens: Int64[np.ndarray, " m"], at: Int64[np.ndarray, " m"], spans: Iterator[tuple[int, int]]
) -> list[int]:
    """The last token that begins within each span of characters (its end too), where there is one."""
    ends = np.array([*spans], np.int64).reshape(-1, 2)
    places = np.searchsorted(at, ends[:, 1], "right") - 1
    found = places[at[places] >= ends[:, 0]] if len(at) else places[:0]
    return [int(token) for token in opens[found]]


def _last(tokens: list[int], after: int, upto: int) -> int | None:
    """The largest of the sorted `tokens` in (after, upto]."""
    place = bisect.bisect_right(tokens, upto) - 1
    return tokens[place] if place >= 0 and tokens[place] > after else None
