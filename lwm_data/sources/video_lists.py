"""Lists of videos: a row names a file below the list's own folder, its caption and the part of it that is meant.

clips.csv      path,caption,start,end              clips.jsonl    {"path": "v/1.mp4", "caption": "A dog runs."}
               v/1.mp4,A dog runs.,0,12.5
               v/1.mp4,It barks.,12.5,20           clips.parquet  the same columns
"""

from __future__ import annotations

import csv
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass

from lwm_data.sources.columns import Row, read_rows
from lwm_data.sources.fields import Fields, UnreadableField
from lwm_data.sources.files import InputFile, open_unpacked
from lwm_data.sources.json_lines import holds_half_a_pair, read_json_lines
from lwm_data.sources.record import UNREAD, Rejection

LISTS = frozenset({"jsonl", "csv", "parquet"})
MAX_CSV_LINE = 1 << 20  # bytes, and characters of a field, which may have many lines
WORDS: frozenset[str | None] = frozenset({"path", "caption", "TEXT", "text", "txt"})  # columns without numbers
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class ListRow:
    """key: the list's, and the number of the row (of a .jsonl or .csv: of the line it ends in)."""

    key: str
    fields: Fields


def read_list(file: InputFile, caption: str | None = None) -> Iterator[ListRow | Rejection]:
    """The rows of the list, and those that cannot be read. caption: a field of words, whatever they look like."""
    if file.path.lower().endswith(".csv"):
        yield from _read_csv(file, WORDS | {caption})
    elif file.path.lower().endswith(".jsonl"):
        for line in read_json_lines(file):
            if isinstance(line, Rejection):
                yield line
            elif isinstance(line.value, dict):
                yield ListRow(line.key, Fields(line.value))
            else:
                yield Rejection(line.key, "wrong field", f"got {type(line.value).__name__}; wanted an object of fields")
    else:
        for row in read_rows(file, batch_rows=1024):
            yield ListRow(f"{file.key}:{row.number}", row.fields) if isinstance(row, Row) else row


def listed_video(file: InputFile, row: ListRow) -> InputFile | Rejection:
    """The video that the row of list `file` names; whether it is there is not looked at."""
    try:
        path = row.fields.find("path")
    except UnreadableField as error:
        return Rejection(row.key, *error.args)
    if not isinstance(path, str) or not path.strip():
        return Rejection(row.key, "no video", "no path; wanted that of a video, relative to the list's folder")
    if "\0" in path or holds_half_a_pair(path):
        return Rejection(row.key, "unsafe name", "path: not a file's name")
    if "://" in path:
        return Rejection(row.key, "not a local file", f"{path[:200]}: addresses are not fetched; download it first")
    folder = posixpath.dirname(file.path)
    below = posixpath.normpath(path)
    if posixpath.isabs(below):
        below = posixpath.relpath(below, folder) if "://" not in folder else ".."
    if below in (".", "..") or below.startswith("../"):
        return Rejection(row.key, "unsafe name", f"{path[:200]}: wanted a path below the list's folder")
    video = InputFile(posixpath.join(folder, below), posixpath.join(posixpath.dirname(file.key), below))
    if video.path == file.path:
        return Rejection(row.key, "no video", "path: the list itself")
    return video


def _read_csv(file: InputFile, words: frozenset[str | None]) -> Iterator[ListRow | Rejection]:
    with open_unpacked(file.path) as raw:

        def lines() -> Iterator[str]:
            first = True
            while line := raw.readline(MAX_CSV_LINE + 1):
                if len(line) > MAX_CSV_LINE:
                    raise csv.Error(f"a line of more than {MAX_CSV_LINE:,} bytes")
                text = line.decode("utf-8", "surrogateescape")
                yield text.removeprefix("\ufeff") if first else text
                first = False

        reader = csv.reader(lines(), strict=True)
        try:
            header = _next_row(reader) or []
            while (row := _next_row(reader)) is not None:
                key = f"{file.key}:{reader.line_num}"
                if not row:
                    continue
                if len(row) != len(header):
                    detail = f"got {len(row)} columns; wanted {len(header)}; quote what has a comma in it"
                    yield Rejection(key, "wrong field", detail)
                elif any(holds_half_a_pair(value) for value in row):
                    yield Rejection(key, "not UTF-8", "a byte that is none")
                else:
                    values = (_csv_value(value, name in words) for value, name in zip(row, header, strict=True))
                    yield ListRow(key, Fields(dict(zip(header, values, strict=True))))
        except csv.Error as error:
            yield Rejection(f"{file.key}:{reader.line_num}", UNREAD, f"no CSV: {error}; the rest is not read")


def _next_row(reader: Iterator[list[str]]) -> list[str] | None:
    """The next row; None at the end. A field may be as long as a line: the module's limit is one for all readers."""
    usual = csv.field_size_limit(MAX_CSV_LINE)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(usual)


def _csv_value(text: str, is_words: bool) -> str | float | None:
    """CSV has no types: what reads as a number is one, nothing is a missing value."""
    if not text:
        return None
    return float(text) if not is_words and NUMBER.fullmatch(text.strip()) else text
