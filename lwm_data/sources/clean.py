"""Cleaning of texts, by the manifest's choice: Unicode normalisation, Project Gutenberg's header and licence.

The Project Gutenberg eBook of Moby Dick ...
*** START OF THE PROJECT GUTENBERG EBOOK MOBY DICK ***      since about 2004; before, the last line of the header
Call me Ishmael. ...                                        was *END*THE SMALL PRINT! FOR PUBLIC DOMAIN ...*END*
End of the Project Gutenberg EBook of Moby Dick             in many files, just before the mark
*** END OF THE PROJECT GUTENBERG EBOOK MOBY DICK ***        before, the line above alone
... licence ...
"""

from __future__ import annotations

import re
import unicodedata

from lwm_data.manifest_sources import Clean

NO_MARK = "no Gutenberg mark"
NEAR = 600  # characters between the words `End of ...` and the mark, at most
MAX_HEADER = 1 << 16  # characters before the end of an old header, at most

_WORK = r"(?:THE|THIS) PROJECT GUTENBERG (?:LICENSED )?E-?(?:BOOK|TEXT)"
_START = re.compile(rf"^[ \t]*\*{{3}} ?START OF {_WORK}[^*]{{0,400}}\*{{3}}[^\n]{{0,400}}$", re.I | re.M)
_OLD_START = re.compile(r"^[ \t]*\*END[* ]? ?THE SMALL PRINT![^\n]{0,400}$", re.I | re.M)
_END = re.compile(rf"^[ \t]*\*{{3}} ?END OF {_WORK}", re.I | re.M)
_END_WORDS = re.compile(r"^[ \t]*End of (?:the |this )?Project Gutenberg", re.I | re.M)


def clean(text: str, by: Clean) -> tuple[str, tuple[str, str] | None]:
    """`text` cleaned, and what is to be told of it: (reason, detail) where a mark was wanted and not found."""
    missing = ""
    if by.gutenberg:
        text, missing = strip_gutenberg(text)
    if by.unicode == "nfc":
        text = unicodedata.normalize("NFC", text)
    elif by.unicode == "nfkc":
        text = unicodedata.normalize("NFKC", text)
    return text, (NO_MARK, f"no mark of the {missing} was found; nothing is cut off there") if missing else None


def strip_gutenberg(text: str) -> tuple[str, str]:
    """`text` between the marks, without blank lines around it; and which marks it lacks, "" where both are there."""
    start = _START.search(text) or _last(_OLD_START, text, 0, MAX_HEADER)
    if start is not None and not text[start.end() :].strip():
        start = None  # the small print stands at the end
    begin = start.end() if start else 0
    end: re.Match[str] | None = _last(_END, text, begin, len(text))
    if end is not None:
        end = _END_WORDS.search(text, max(begin, end.start() - NEAR), end.start()) or end
    else:
        end = _last(_END_WORDS, text, begin, len(text))
    missing = " and the ".join(name for name, mark in (("start", start), ("end", end)) if mark is None)
    if start is None and end is None:
        return text, missing
    return text[begin : end.start() if end else len(text)].strip("\r\n") + "\n", missing


def _last(pattern: re.Pattern[str], text: str, begin: int, stop: int) -> re.Match[str] | None:
    found = None
    for match in pattern.finditer(text, begin, stop):
        found = match
    return found
