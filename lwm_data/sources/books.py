"""Books: one plain text file is one record, all of it trained but BOS.

<s> Call me Ishmael. Some years ago ... </s>
 -  |------------- trained ----------------|
"""

from __future__ import annotations

from collections.abc import Iterator

from lwm_data.format.example import text_runs
from lwm_data.format.vocab import TextTokenizer
from lwm_data.sources.files import InputFile, read_text
from lwm_data.sources.record import Record, Rejection

VERSION = 1  # raise it when the same file gives other tokens


def read_book(file: InputFile, tokenizer: TextTokenizer) -> Iterator[Record | Rejection]:
    """The one record of `file`."""
    try:
        text = read_text(file.path)
    except ValueError as error:
        reason, detail = error.args
        yield Rejection(file.key, reason, detail)
        return
    yield Record(file.key, text_runs(tokenizer, [(tokenizer.encode(text), True)], eos=True))
