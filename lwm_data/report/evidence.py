"""A pair beside the text that proves its answer.

question    Who hid the gold?                 before    ... of the island.
answer      Ben Gunn.                         parts     It was [Ben Gunn] who hid it. ...    the chunk; [] is marked
                                              after     The map lay ...
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

WORDS = re.compile(r"\w{4,}")


@dataclass
class ShownPair:
    """before, parts, after: the text around the chunk, and the chunk, as (text, whether it is marked).

    problem: why there is no evidence. reason: why the pair was rejected, else empty.
    """

    question: str
    answer: str
    book: str
    place: str
    raw: str = ""
    reason: str = ""
    detail: str = ""
    before: str = ""
    parts: list[tuple[str, bool]] = field(default_factory=list)
    after: str = ""
    problem: str = ""


def marked(chunk: str, answer: str) -> list[tuple[str, bool]]:
    """The chunk with the answer marked, where it stands there; else its words of four letters and more."""
    words = sorted(set(WORDS.findall(answer)), key=len, reverse=True)[:50]
    whole = answer.strip().rstrip(".")
    pattern = re.escape(whole)
    if not whole or not re.search(pattern, chunk, re.IGNORECASE):
        if not words:
            return [(chunk, False)]
        pattern = rf"\b(?:{'|'.join(map(re.escape, words))})"
    parts: list[tuple[str, bool]] = []
    at = 0
    for match in re.finditer(pattern, chunk, re.IGNORECASE):
        parts += [(chunk[at : match.start()], False), (match[0], True)]
        at = match.end()
    return [*parts, (chunk[at:], False)]
