"""Images: pictures with captions in img2dataset's tars, in Parquet or Arrow files, or as files in folders.

    00000.tar     000000007.jpg  000000007.txt  000000007.json      beside it 00000.parquet with the same fields
    a.parquet     jpg | caption | width | height | similarity       a picture as bytes, or {bytes, path} as `datasets`
    photos/       cat.jpg  cat.txt  cat.json

What img2dataset could not download is in its metadata alone: no record, and so no rejection, here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from lwm_data.manifest_sources import Images
from lwm_data.sources.columns import Row, read_rows
from lwm_data.sources.fields import UnreadableField
from lwm_data.sources.files import InputFile
from lwm_data.sources.key_index import SeenKeys
from lwm_data.sources.media import MediaItem, admit
from lwm_data.sources.media_units import COLUMNS, PICTURES, suffix
from lwm_data.sources.record import Rejection
from lwm_data.sources.samples import Kind, loose_samples, tar_samples

PICTURE = Kind("picture", PICTURES, 256 << 20)
PICTURE_COLUMNS = ("image", "img", "picture", "bytes", "image_bytes", *sorted(PICTURES))


def read_images(source: Images, files: tuple[InputFile, ...]) -> Iterator[MediaItem | Rejection]:
    """The pictures of one unit, as `group_files` makes them, in the order of the file."""
    kind = suffix(files[0].path)
    if kind in COLUMNS:
        yield from _read_columns(source, files[0])
        return
    samples = tar_samples(files, PICTURE) if kind == "tar" else loose_samples(files, PICTURE)
    for sample in samples:
        if isinstance(sample, Rejection):
            yield sample
        else:
            yield admit(source, sample.key, sample.data, sample.fields)


def _read_columns(source: Images, file: InputFile) -> Iterator[MediaItem | Rejection]:
    seen = SeenKeys()
    for row in read_rows(file):
        if isinstance(row, Rejection):
            yield row
            continue
        column = _picture_column(row.batch.schema)
        if column is None:
            names = ", ".join(row.batch.schema.names)[:200]
            yield Rejection(file.key, "no picture", f"wanted a column of pictures' bytes; got {names}")
            return
        item = _read_row(source, file, row, column)
        if item is not None:
            yield item if seen.add(item.key) else Rejection(item.key, "duplicate key", "an earlier row has it")


def _read_row(source: Images, file: InputFile, row: Row, column: str) -> MediaItem | Rejection | None:
    """None: a row that stands for a picture which could not be downloaded."""
    key = f"{file.key}/{row.number}"
    try:
        own = row.fields.find("key")
        if isinstance(own, str) and own:
            key = f"{file.key}/{own}"
        value = row.value(column)
        if isinstance(value, pa.StructScalar):
            value = value["bytes"]
        picture = value.as_buffer() if value.is_valid else None
        if picture is None or not picture.size:
            if str(row.fields.find("status")).startswith("failed"):
                return None
            return Rejection(key, "no picture", f"{column}: no bytes of one")
        if picture.size > PICTURE.max_bytes:
            return Rejection(key, "too large", f"{picture.size:,} bytes; wanted {PICTURE.max_bytes:,} or fewer")
        return admit(source, key, picture.to_pybytes(), row.fields)
    except UnreadableField as error:
        return Rejection(key, *error.args)


def _picture_column(schema: pa.Schema) -> str | None:
    """The column that holds pictures: one of the usual names that no other has, or the only one of bytes."""
    found = [field.name for field in schema if _holds_bytes(field.type)]
    usual = [name for name in PICTURE_COLUMNS if found.count(name) == 1]
    return usual[0] if usual else found[0] if len(found) == 1 else None


def _holds_bytes(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
