"""JSON lines: one value a line, read with bounded memory; a line that cannot be read is a rejection, not an error.

chats.jsonl      {"id": 1}      chats.jsonl:1   {"id": 1}
                                                                  blank lines are skipped, but counted
                 {"id": 2       chats.jsonl:3   not JSON
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lwm_data.sources.files import BLOCK, DAMAGED, InputFile, open_unpacked
from lwm_data.sources.record import UNREAD, Rejection

MAX_LINE = 64 << 20  # bytes
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class JsonLine:
    """key: the file's, and the number of the line in it, from 1. value: as the json module gives it."""

    key: str
    value: Any


def read_json_lines(file: InputFile) -> Iterator[JsonLine | Rejection]:
    """What is in each line of `file` that is not blank. A line too long is passed over; damage ends the file."""
    for line in read_lines(file):
        if isinstance(line, Rejection):
            yield line
        else:
            yield _parse(line[1], line[0])


def read_lines(file: InputFile) -> Iterator[tuple[str, bytes] | Rejection]:
    """The key and the bytes of each line of `file` that is not blank; none of them is longer than MAX_LINE."""
    number = 0
    try:
        with open_unpacked(file.path) as lines:
            while line := lines.readline(MAX_LINE + 1):
                number += 1
                key = f"{file.key}:{number}"
                if len(line) > MAX_LINE:
                    num_bytes = len(line)
                    while not line.endswith(b"\n") and (line := lines.readline(BLOCK)):
                        num_bytes += len(line)
                    yield Rejection(key, "too large", f"a line of {num_bytes:,} bytes; wanted {MAX_LINE:,} or fewer")
                elif line.strip():
                    yield key, line.removeprefix(BOM) if number == 1 else line
    except DAMAGED as error:
        yield Rejection(f"{file.key}:{number + 1}", UNREAD, f"cannot be unpacked: {error}; the rest is not read")


def _parse(line: bytes, key: str) -> JsonLine | Rejection:
    try:
        return JsonLine(key, json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return Rejection(key, "not UTF-8", f"byte 0x{line[error.start]:02x} at offset {error.start:,} of the line")
    except (ValueError, RecursionError) as error:  # a number of too many digits is a plain ValueError
        return Rejection(key, "not JSON", str(error))


def holds_half_a_pair(text: str) -> bool:
    r"""Whether `text` has half of a surrogate pair, which JSON can spell (`"\ud800"`) and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
