"""What is known of a record besides its pixels: fields of a JSON file, of a row, of the text beside.

    000000007.json  {"caption": ..., "width": 512}  -\
    000000007.txt   A cat on a mat.                 --> Fields  f["width"]  f.find("punsafe")
    00000.parquet   similarity 0.31                 -/          one name after the other, where it is asked for
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from lwm_data.sources.record import Rejection

MAX_JSON = 1 << 20  # bytes


class UnreadableField(ValueError):
    """A value is there that cannot be taken. The two arguments are the reason, one of few, and the detail."""


class Fields(dict[str, Any]):
    """The fields of a record: those that are `known`, then what `more` gives for a name; null means missing.

    Whoever asks for one may get an UnreadableField.
    """

    def __init__(self, known: Mapping[str, Any], more: Callable[[str], Any] = lambda name: None) -> None:
        super().__init__((name, value) for name, value in known.items() if value is not None)
        self._more = more

    def __missing__(self, name: str) -> Any:
        value = self._more(name)
        if value is None:
            raise KeyError(name)
        self[name] = value
        return value

    def find(self, name: str) -> Any:
        """The value of the field, None where there is none."""
        try:
            return self[name]
        except KeyError:
            return None


def sidecar_fields(
    key: str, text: bytes | None, data: bytes | None, more: Callable[[str], Any] = lambda name: None
) -> Fields | Rejection:
    """The fields in a record's text file (as `txt`) and in its JSON file; None: it has no such file."""
    known: dict[str, Any] = {}
    if data is not None:
        try:
            known = json.loads(data.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            return Rejection(key, "not UTF-8", f"its .json: byte 0x{data[error.start]:02x} at offset {error.start:,}")
        except (ValueError, RecursionError) as error:  # a number of too many digits is a plain ValueError
            return Rejection(key, "not JSON", f"its .json: {error}")
        if not isinstance(known, dict):
            return Rejection(key, "not JSON", f"its .json: got {type(known).__name__}; wanted an object of fields")
    if text is not None:
        try:
            known["txt"] = text.decode("utf-8")
        except UnicodeDecodeError as error:
            return Rejection(key, "not UTF-8", f"its .txt: byte 0x{text[error.start]:02x} at offset {error.start:,}")
    return Fields(known, more)
