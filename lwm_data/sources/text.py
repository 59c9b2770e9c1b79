"""Texts: records of any file that holds many, all trained but BOS.

a.jsonl, a.json, a.parquet, a.arrow   {"id": 7, "text": "Call me ..."}          7, or a.jsonl:1 without an id
a.tar                                 000007.txt (or 000007.json with a text)   a.tar/000007
a.txt                                 records: file                             a.txt
                                      records: lines                            a.txt:1, a.txt:2, ...
each       <s> Call me Ishmael. Some years ago ... </s>
            -  |------------- trained ----------------|
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from lwm_data.format.example import text_runs
from lwm_data.format.vocab import TextTokenizer
from lwm_data.manifest_sources import Clean, Split, Text
from lwm_data.sources.clean import clean
from lwm_data.sources.files import MAX_TEXT_BYTES, InputFile, read_text
from lwm_data.sources.heldout import other_side
from lwm_data.sources.json_lines import MAX_LINE, holds_half_a_pair, read_lines
from lwm_data.sources.media_units import blocks, is_about_a_folder
from lwm_data.sources.objects import COLUMNS, JSON, kind_of, named_key, read_objects
from lwm_data.sources.record import Record, Rejection
from lwm_data.sources.samples import Group, Kind, tar_groups

VERSION = 2  # raise it when the same file gives other tokens
SMALL_FILES = 256  # files of one record that are one unit, on average
OPTIONS = {"field", "key", "records", "clean", "split"}  # of the source, that tokens depend on
TAR_TEXTS = Kind("text", frozenset({"txt"}), MAX_TEXT_BYTES)


def group_texts(source: Text, files: list[InputFile]) -> list[tuple[InputFile, ...]]:
    """The input of each unit: a file that holds many records, or a block of files of one record each."""
    many: list[tuple[InputFile, ...]] = []
    single = []
    for file in files:
        if source.records == "lines" or kind_of(file) in (*COLUMNS, *JSON, "tar", "tgz"):
            if not is_about_a_folder(file.path):
                many.append((file,))
        else:
            single.append((file,))
    return many + [tuple(file for group in block for file in group) for block in blocks(single, SMALL_FILES)]


def read_texts(source: Text, file: InputFile, tokenizer: TextTokenizer) -> Iterator[Record | Rejection]:
    """The records of `file`."""
    for found in _texts(source, file):
        if isinstance(found, Rejection):
            yield found
        else:
            key, text = found
            yield text_record(key, text, source.clean, source.split, tokenizer)


def text_record(
    key: str, text: str, cleaning: Clean, split: Split | None, tokenizer: TextTokenizer
) -> Record | Rejection:
    """The record of a text, if it is of the side that is wanted and anything is left of it."""
    filtered = other_side(split, key)
    if filtered is not None:
        return filtered
    cleaned, note = clean(text, cleaning)
    if not cleaned.strip():
        return Rejection(key, "empty", "no text" if not text.strip() else "no text is left once it is cleaned")
    return Record(key, text_runs(tokenizer, [(tokenizer.encode(cleaned), True)], eos=True), note)


def _texts(source: Text, file: InputFile) -> Iterator[tuple[str, str] | Rejection]:
    """Key and text of each record."""
    kind = kind_of(file)
    if kind in ("tar", "tgz"):
        for group in tar_groups(file, TAR_TEXTS, {"json": MAX_LINE}):
            yield group if isinstance(group, Rejection) else _of_group(source, f"{file.key}/{group.name}", group)
    elif kind in COLUMNS or kind in JSON:
        for found in read_objects(file, {source.field, source.key or "id"}):
            yield found if isinstance(found, Rejection) else _of_fields(source, found.key, found.value)
    elif source.records == "lines":
        for line in read_lines(file):
            if isinstance(line, Rejection):
                yield line
            else:
                text = _decoded(line[0], line[1].rstrip(b"\r\n"))
                yield text if isinstance(text, Rejection) else (line[0], text)
    else:
        try:
            yield file.key, read_text(file.path)
        except ValueError as error:
            yield Rejection(file.key, *error.args)


def _of_group(source: Text, place: str, group: Group) -> tuple[str, str] | Rejection:
    """Of a tar's sample: its .txt, else the field of its .json."""
    fields: Any = {}
    if "json" in group.parts:
        text = _decoded(place, group.parts["json"])
        if isinstance(text, Rejection):
            return text
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:  # a number of too many digits is a plain ValueError
            return Rejection(place, "not JSON", f"its .json: {error}")
    elif "txt" not in group.parts:
        return Rejection(place, "no text", "wanted a .txt or .json of this name")
    if "txt" in group.parts and isinstance(fields, dict):
        text = _decoded(place, group.parts["txt"])
        if isinstance(text, Rejection):
            return text
        fields[source.field] = text
    return _of_fields(source, place, fields)


def _of_fields(source: Text, place: str, fields: Any) -> tuple[str, str] | Rejection:
    if not isinstance(fields, dict):
        return Rejection(place, "not an object", f"got {type(fields).__name__}; wanted an object with {source.field}")
    key = named_key(fields, source.key, place)
    if isinstance(key, Rejection):
        return key
    text = fields.get(source.field)
    if text is None:
        names = ", ".join(repr(name)[:40] for name in list(fields)[:8]) or "nothing"
        return Rejection(key, "missing field", f"{source.field}: there is none; the record has {names} (field)")
    if not isinstance(text, str):
        return Rejection(key, "wrong field", f"{source.field}: got {type(text).__name__}; wanted a text")
    if holds_half_a_pair(text):
        return Rejection(key, "not UTF-8", f"{source.field}: holds half of a surrogate pair")
    return key, text


def _decoded(key: str, data: bytes) -> str | Rejection:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Rejection(key, "not UTF-8", f"byte 0x{data[error.start]:02x} at offset {error.start:,}")
