"""Text of data as it may stand in a page: its control characters are seen, and its length is bounded.

"one\\x1b[2J two ... nine"  ->  head "one␛[2J tw"   left_out 13   tail "ine"

The templates escape what they are given; nothing here does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lwm_data.summary import visible


@dataclass(frozen=True)
class CutText:
    """head, then so many characters that are left out, then tail; a text that fits is all head."""

    head: str
    left_out: int = 0
    tail: str = ""


def shown(value: Any, most: int = 200) -> str:
    """One line of data, of at most `most` characters and a sign that more follow."""
    text = value if isinstance(value, str) else "" if value is None else str(value)
    return visible(text[:most]) + "…" * (len(text) > most)


def cut_text(text: str, most: int) -> CutText:
    """`text` with its line ends; a longer one loses its middle, since an answer or a question may be at either end."""
    text = text.replace("\r\n", "\n")
    if len(text) <= most:
        return CutText(visible(text, kept="\n\t"))
    tail = most // 3
    parts = text[: most - tail], text[len(text) - tail :]
    head, end = (visible(part, kept="\n\t") for part in parts)
    return CutText(head, len(text) - most, end)
