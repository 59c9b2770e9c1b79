"""Chats: UltraChat rows, one JSON object a line; the assistant's words and the EOS after them are trained.

{"id": "17", "data": ["Hello!", "Good day.", "Bye!", "Bye."]}
                       user      assistant    user    assistant
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lwm_data.format.prompt import chat_runs
from lwm_data.format.vocab import TextTokenizer
from lwm_data.sources.files import InputFile
from lwm_data.sources.json_lines import JsonLine, holds_half_a_pair, read_json_lines
from lwm_data.sources.record import Record, Rejection

VERSION = 1  # raise it when the same file gives other tokens


def read_chats(file: InputFile, tokenizer: TextTokenizer) -> Iterator[Record | Rejection]:
    """A record of each line of `file`; blank lines are skipped."""
    for line in read_json_lines(file):
        yield line if isinstance(line, Rejection) else _chat(line, tokenizer)


def _chat(line: JsonLine, tokenizer: TextTokenizer) -> Record | Rejection:
    row = line.value
    problem = _problem(row)
    if problem is not None:
        return Rejection(line.key, "not a chat", problem)
    data: list[str] = row["data"]
    key = row.get("id")
    return Record(
        str(key) if isinstance(key, str | int) and str(key) else line.key,
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
        if isinstance(text, str) and holds_half_a_pair(text):
            return f"{name}: holds half of a surrogate pair"
    return None
