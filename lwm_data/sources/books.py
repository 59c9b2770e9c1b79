"""Books: one plain text file is one record, all of it trained but BOS.

<s> Call me Ishmael. Some years ago ... </s>
 -  |------------- trained ----------------|
"""

from __future__ import annotations

from collections.abc import Iterator

from lwm_data.format.vocab import TextTokenizer
from lwm_data.manifest_sources import Books
from lwm_data.sources.files import InputFile, read_text
from lwm_data.sources.heldout import other_side
from lwm_data.sources.record import Record, Rejection
from lwm_data.sources.text import text_record

VERSION = 1  # raise it when the same file gives other tokens
OPTIONS = {"clean", "split"}  # of the source, that tokens depend on


def read_book(source: Books, file: InputFile, tokenizer: TextTokenizer) -> Iterator[Record | Rejection]:
    """The one record of `file`."""
    filtered = other_side(source.split, file.key)
    if filtered is not None:
        yield filtered
        return
    try:
        text = read_text(file.path)
    except ValueError as error:
        yield Rejection(file.key, *error.args)
        return
    yield text_record(file.key, text, source.clean, source.split, tokenizer)
