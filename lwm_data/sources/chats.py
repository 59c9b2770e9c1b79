"""Chats: UltraChat rows, one JSON object a line; the assistant's words and the EOS after them are trained.

{"id": "17", "data": ["Hello!", "Good day.", "Bye!", "Bye."]}
                       user      assistant    user    assistant
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from lwm_data.format.prompt import chat_runs
from lwm_data.format.vocab import TextTokenizer
from lwm_data.sources.files import DAMAGED, InputFile, open_unpacked
from lwm_data.sources.record import Record, Rejection

VERSION = 1  # raise it when the same file gives other tokens
MAX_LINE = 64 << 20  # bytes


def read_chats(file: InputFile, tokenizer: TextTokenizer) -> Iterator[Record | Rejection]:
    """A record of each line of `file`; blank lines are skipped."""
    number = 0
    try:
        with open_unpacked(file.path) as lines:
            while line := lines.readline(MAX_LINE + 1):
                number += 1
                where = f"{file.key}:{number}"
                if len(line) > MAX_LINE:
                    yield Rejection(where, "damaged", f"a line of more than {MAX_LINE:,} bytes; the rest is not read")
                    return
                if line.strip():
                    yield _read_line(line, where, tokenizer)
    except DAMAGED as error:
        yield Rejection(f"{file.key}:{number + 1}", "damaged", f"cannot be unpacked: {error}; the rest is not read")


def _read_line(line: bytes, where: str, tokenizer: TextTokenizer) -> Record | Rejection:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Rejection(where, "not UTF-8", f"byte 0x{line[error.start]:02x} at offset {error.start:,} of the line")
    except (ValueError, RecursionError) as error:  # a number of too many digits is a plain ValueError
        return Rejection(where, "not JSON", str(error))
    problem = _problem(row)
    if problem is not None:
        return Rejection(where, "not a chat", problem)
    data: list[str] = row["data"]
    key = row.get("id")
    return Record(
        str(key) if isinstance(key, str | int) and str(key) else where,
        chat_runs(tokenizer, list(zip(data[::2], data[1::2], strict=True))),
    )


def _problem(row: Any) -> str | None:
    """Why `row` is no chat."""
    if not isinstance(row, dict) or not isinstance(row.get("data"), list):
        return 'wanted {"id": ..., "data": [user, assistant, ...]}'
    data = row["data"]
    if not data or len(data) % 2:
        return f"data: {len(data)} turns; wanted pairs of user and assistant"
    for i, turn in enumerate(data):
        if not isinstance(turn, str) or not turn.strip():
            got = repr(turn[:40]) if isinstance(turn, str) else type(turn).__name__
            return f"data.{i}: got {got}; wanted the words of a turn"
    for name, text in [("id", row.get("id")), *((f"data.{i}", turn) for i, turn in enumerate(data))]:
        try:
            (text if isinstance(text, str) else "").encode("utf-8")
        except UnicodeEncodeError:
            return f"{name}: holds half of a surrogate pair"
    return None
