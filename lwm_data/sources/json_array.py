"""A JSON array, as ShareGPT is shipped: one element after the other, with bounded memory.

[ {"id": 1}, {"id": 2}, ... ]         c.json:1   {"id": 1}
  |-------|                           c.json:2   {"id": 2}
  held until it is whole, never more than MAX_LINE characters
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from lwm_data.sources.files import BLOCK, DAMAGED, InputFile, open_unpacked
from lwm_data.sources.json_lines import MAX_LINE, JsonLine
from lwm_data.sources.record import UNREAD, Rejection

BLANKS = re.compile(r"[ \t\n\r]*")


class _Refused(Exception):
    """Why nothing after here can be read."""


def starts_with_bracket(file: InputFile) -> bool:
    """Whether `file` begins as an array does; one that is damaged there does not."""
    try:
        with open_unpacked(file.path) as raw:
            return raw.read(BLOCK).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    except DAMAGED:
        return False


def read_json_array(file: InputFile) -> Iterator[JsonLine | Rejection]:
    """The elements of the array that `file` is; what is no JSON, too large or damaged ends the file."""
    number = 0
    try:
        with open_unpacked(file.path) as raw:
            for value in _elements(_Window(raw)):
                number += 1
                yield JsonLine(f"{file.key}:{number}", value)
    except _Refused as refused:
        yield Rejection(f"{file.key}:{number + 1}", UNREAD, f"{refused}; the rest is not read")
    except DAMAGED as error:
        yield Rejection(f"{file.key}:{number + 1}", UNREAD, f"cannot be unpacked: {error}; the rest is not read")


class _Window:
    """The text that is read and not taken yet."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text = ""
        self.at = 0
        self.is_last = False

    def grow(self) -> bool:
        """Read more, as much again as is held; whether there was any."""
        if self.is_last:
            return False
        data = self._raw.read(max(BLOCK, len(self.text) - self.at))
        self.is_last = not data
        try:
            self.text = self.text[self.at :] + self._decoder.decode(data, final=self.is_last)
        except UnicodeDecodeError as error:
            raise _Refused(f"not UTF-8: byte 0x{error.object[error.start]:02x}") from None
        self.at = 0
        return True

    def next_sign(self) -> str:
        """The next character that is no blank, which is not taken; "" at the end."""
        while True:
            self.at = BLANKS.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches anything
            if self.at < len(self.text) or not self.grow():
                return self.text[self.at : self.at + 1]


def _elements(window: _Window) -> Iterator[object]:
    decode = json.JSONDecoder().raw_decode
    if window.next_sign() != "[":
        raise _Refused("not JSON: wanted an array")
    window.at += 1
    if window.next_sign() == "]":
        _expect_end(window)
        return
    while True:
        window.next_sign()
        while True:
            problem = "it ends within an element"
            try:
                value, end = decode(window.text, window.at)
                if end < len(window.text) or window.is_last:  # or a number may go on
                    break
            except (ValueError, RecursionError) as error:  # not whole yet, or no JSON at all
                problem = str(error)
            if len(window.text) - window.at > MAX_LINE:
                raise _Refused(f"too large: no whole element in {MAX_LINE:,} characters ({problem})")
            if not window.grow():
                raise _Refused(f"not JSON: {problem}")
        window.at = end
        yield value
        sign = window.next_sign()
        if sign not in (",", "]"):
            got = f"wanted , or ] after an element, got {sign!r}" if sign else "the array is cut"
            raise _Refused(f"not JSON: {got}")
        window.at += 1
        if sign == "]":
            window.at -= 1
            _expect_end(window)
            return


def _expect_end(window: _Window) -> None:
    window.at += 1
    if window.next_sign():
        raise _Refused("not JSON: more follows the end of the array")
