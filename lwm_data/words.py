"""Words of a text as numbers, and n-grams of them: what near duplicates and evaluation texts are known by.

"It was -- the BEST."    it  was  the  best          lower case; no punctuation
                         w0  w1   w2   w3            uint64 each, the same on every machine
n-grams of 3             h(w0 w1 w2)  h(w1 w2 w3)    uint64
"""

from __future__ import annotations

import hashlib
import re

import numpy as np
from jaxtyping import UInt64

MAX_KNOWN = 1 << 20  # words whose number is remembered
# Chinese and Japanese have no blanks: there each character is a word.
_CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying by it loses nothing
_MIX = np.uint64(0xFF51AFD7ED558CCD)  # of MurmurHash3's finalizer, as is the shift
_SHIFT = np.uint64(33)


def split_words(text: str) -> list[str]:
    """The words of `text`, in lower case."""
    return WORD.findall(text.lower())


class WordNumbers:
    """Gives each word its number, a hash of its letters; remembers those of MAX_KNOWN words."""

    def __init__(self) -> None:
        self._known = _Known()

    def __call__(self, words: list[str]) -> UInt64[np.ndarray, " n"]:
        return np.fromiter(map(self._known.__getitem__, words), np.uint64, len(words))


class _Known(dict[str, int]):
    def __missing__(self, word: str) -> int:
        number = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        if len(self) < MAX_KNOWN:
            self[word] = number
        return number


def ngram_hashes(numbers: UInt64[np.ndarray, " n"], size: int) -> UInt64[np.ndarray, " m"]:
    """A hash of each `size` words in a row; none where there are fewer words."""
    count = max(0, len(numbers) - size + 1)
    hashes = numbers[:count].copy()
    for place in range(1, size):
        hashes *= _FACTOR
        hashes += numbers[place : place + count]
    hashes ^= hashes >> _SHIFT
    hashes *= _MIX
    hashes ^= hashes >> _SHIFT
    return hashes
