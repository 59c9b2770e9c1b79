"""Objects of any file that holds many: one record's fields after another, whatever the file is.

a.jsonl(.gz, .zst)   {"id": 7, "text": "..."}         a.jsonl:1     lines count from 1
a.json(.gz, .zst)    [{"id": 7, "text": "..."}, ...]  a.json:1      so do elements; without a [, it is read as lines
a.parquet, a.arrow   id | text                        a.parquet:0   rows count from 0
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from lwm_data.sources.columns import Row, read_rows
from lwm_data.sources.fields import UnreadableField
from lwm_data.sources.files import InputFile
from lwm_data.sources.json_array import read_json_array, starts_with_bracket
from lwm_data.sources.json_lines import MAX_LINE, JsonLine, holds_half_a_pair, read_json_lines
from lwm_data.sources.record import Rejection

BATCH_ROWS = 64  # rows that are held together; each may be a whole book
COLUMNS = ("parquet", "arrow")
JSON = ("jsonl", "json", "ndjson")


def kind_of(file: InputFile) -> str:
    """What the file's name ends with, in small letters, but for .gz or .zst."""
    name = file.key.lower()
    for packed in (".gz", ".zst"):
        name = name.removesuffix(packed)
    return name.rpartition(".")[2] if "." in name.rpartition("/")[2] else ""


def read_objects(file: InputFile, columns: Collection[str]) -> Iterator[JsonLine | Rejection]:
    """The objects of `file`. columns: what is wanted of a Parquet or Arrow file; of JSON, all is there."""
    kind = kind_of(file)
    if kind in COLUMNS:
        for row in read_rows(file, BATCH_ROWS, columns):
            yield row if isinstance(row, Rejection) else _of_row(file, row, columns)
    elif kind == "json" and starts_with_bracket(file):
        yield from read_json_array(file)
    else:
        yield from read_json_lines(file)


def _of_row(file: InputFile, row: Row, columns: Collection[str]) -> JsonLine | Rejection:
    key = f"{file.key}:{row.number}"
    size = row.num_bytes()
    if size > MAX_LINE:
        return Rejection(key, "too large", f"a row of {size:,} bytes; wanted {MAX_LINE:,} or fewer")
    try:
        values = {name: row.fields.find(name) for name in columns}
    except UnreadableField as error:
        return Rejection(key, *error.args)
    return JsonLine(key, {name: value for name, value in values.items() if value is not None})


def named_key(fields: dict[str, Any], name: str | None, place: str) -> str | Rejection:
    """The record's key: field `name`, or without a name its `id` where it has one, else its place."""
    value = fields.get("id" if name is None else name)
    if isinstance(value, str | int) and not isinstance(value, bool) and str(value):
        if not holds_half_a_pair(str(value)):
            return str(value)
        return Rejection(place, "wrong field", f"{name or 'id'}: holds half of a surrogate pair")
    if name is None:
        return place
    return Rejection(place, "missing field", f"{name}: got {type(value).__name__}; wanted the record's name (key)")
