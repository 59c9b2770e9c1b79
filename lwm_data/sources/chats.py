"""Chats: a record each, in any of the formats of chat_formats.py; the assistant's words and the EOS after them are
trained.

{"id": "17", "data": ["Hello!", "Good day.", "Bye!", "Bye."]}
                       user      assistant    user    assistant
"""

from __future__ import annotations

from collections.abc import Iterator

from lwm_data.format.prompt import SYSTEM, chat_runs
from lwm_data.format.vocab import TextTokenizer
from lwm_data.manifest_sources import Chats
from lwm_data.sources.chat_formats import FIELDS, NotAChat, parse_chat
from lwm_data.sources.files import InputFile
from lwm_data.sources.heldout import other_side
from lwm_data.sources.json_lines import JsonLine
from lwm_data.sources.objects import named_key, read_objects
from lwm_data.sources.record import Record, Rejection

VERSION = 3  # raise it when the same file gives other tokens
OPTIONS = {"key", "split"}  # of the source, that tokens depend on
LEFT_OUT = "turn left out"


def read_chats(source: Chats, file: InputFile, tokenizer: TextTokenizer) -> Iterator[Record | Rejection]:
    """A record of each chat of `file`; blank lines are skipped."""
    for found in read_objects(file, {*FIELDS, source.key or "id"}):
        yield found if isinstance(found, Rejection) else _chat(source, found, tokenizer)


def _chat(source: Chats, found: JsonLine, tokenizer: TextTokenizer) -> Record | Rejection:
    try:
        chat = parse_chat(found.value)
    except NotAChat as error:
        return Rejection(found.key, *error.args)
    key = named_key(found.value, source.key, found.key)
    if isinstance(key, Rejection):
        return key
    filtered = other_side(source.split, key)
    if filtered is not None:
        return filtered
    runs = chat_runs(tokenizer, list(chat.turns), SYSTEM if chat.system is None else chat.system)
    return Record(key, runs, (LEFT_OUT, chat.left_out) if chat.left_out else None)
