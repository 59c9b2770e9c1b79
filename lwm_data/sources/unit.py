"""Units of tokenizing: one input file of a source, or a block of made-up examples; each fills one store file.

manifest -> plan_units -> Unit, Unit, ...     named by a fingerprint of all that its tokens depend on
                          read_unit -> Record | Rejection, ...
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from lwm_data.format.vocab import TextTokenizer
from lwm_data.manifest import Books, Chats, Needles
from lwm_data.sources import books, chats, needles
from lwm_data.sources.files import InputFile, check_unchanged
from lwm_data.sources.record import Record, Rejection


@dataclass(frozen=True)
class Unit:
    """files: one, or a haystack. start, stop: of the block of examples, where these are made up."""

    source: Books | Chats | Needles
    files: tuple[InputFile, ...]
    seed: int
    start: int
    stop: int
    fingerprint: str

    @property
    def file_name(self) -> str:
        """In the token store."""
        return f"{self.source.name}-{self.fingerprint[:32]}.arrow"


def input_glob(source: Books | Chats | Needles) -> tuple[str, str]:
    """The glob of the source's input and the manifest's key of it."""
    if isinstance(source, Needles):
        return source.haystack, "haystack"
    return source.path, "path"


def plan_units(
    source: Books | Chats | Needles, files: tuple[InputFile, ...], seed: int, tokenizer: TextTokenizer
) -> list[Unit]:
    """The units of `source`, whose input is `files` (hashed)."""
    if isinstance(source, Needles):
        made_of = [needles.VERSION, seed, source.model_dump(exclude={"haystack", "count", "overflow"})]
        made_of += [tokenizer.fingerprint, [(file.key, file.sha256) for file in files]]
        blocks = [(at, min(at + needles.BLOCK, source.count)) for at in range(0, source.count, needles.BLOCK)]
        return [Unit(source, files, seed, at, end, _fingerprint([*made_of, at, end])) for at, end in blocks]
    version = books.VERSION if isinstance(source, Books) else chats.VERSION
    made_of = [source.type, version, tokenizer.fingerprint]
    return [Unit(source, (file,), seed, 0, 0, _fingerprint([*made_of, file.key, file.sha256])) for file in files]


def read_unit(unit: Unit, tokenizer: TextTokenizer) -> Iterator[Record | Rejection]:
    """The unit's records in order. ValueError, at the latest after the last, where a file is not what was hashed."""
    if isinstance(unit.source, Needles):
        yield from needles.read_needles(unit.source, unit.seed, unit.files, unit.start, unit.stop, tokenizer)
        return
    (file,) = unit.files
    if isinstance(unit.source, Books):
        yield from books.read_book(file, tokenizer)
    else:
        yield from chats.read_chats(file, tokenizer)
    check_unchanged(file)


def _fingerprint(made_of: list[object]) -> str:
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
