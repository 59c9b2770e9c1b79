"""Units of tokenizing: one input file of a source, a block of small ones or of made-up examples; each fills one store
file.

manifest -> plan_units -> Unit, Unit, ...     named by a fingerprint of all that its tokens depend on
                          read_unit -> Record | Rejection, ...

A unit of pictures or videos has a file of codes besides, made before (lwm_data/encode.py) and named by what they alone
depend on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from lwm_data.code_store import CodeFile
from lwm_data.folder import Folder
from lwm_data.format.vocab import TextTokenizer
from lwm_data.manifest_sources import AnySource, Books, Chats, Images, LwmJsonl, Needles, Qa, Text, Tokens, Videos
from lwm_data.sources import books, chats, lwm_jsonl, media, needles, qa, text, tokens
from lwm_data.sources.files import InputFile, check_unchanged
from lwm_data.sources.heldout import other_side
from lwm_data.sources.record import Record, Rejection


@dataclass(frozen=True)
class Unit:
    """files: one, some small texts, a haystack, pairs and their books, or media with what lies beside them.

    start, stop: of the block of made-up examples; of pairs, the number of their files, which books follow.
    codes: of pictures and videos, the name of their file of codes in the store.
    """

    source: AnySource
    files: tuple[InputFile, ...]
    seed: int
    fingerprint: str
    start: int = 0
    stop: int = 0
    codes: str = ""

    @property
    def file_name(self) -> str:
        """In the token store."""
        return f"{self.source.name}-{self.fingerprint[:32]}.arrow"


def input_glob(source: AnySource) -> tuple[str, str]:
    """The glob of the source's input and the manifest's key of it."""
    if isinstance(source, Needles):
        return source.haystack, "haystack"
    return source.path, "path"


def group_input(source: AnySource, files: list[InputFile]) -> list[tuple[InputFile, ...]]:
    """The input of each unit: files that are found, not hashed yet, and what is read beside them.

    ValueError where a split leaves nothing to make examples of.
    """
    if isinstance(source, Images | Videos):
        return media.group_files(source, files)
    if isinstance(source, Text):
        return text.group_texts(source, files)
    if isinstance(source, Qa):
        return qa.group_books(source, files)
    if isinstance(source, Needles):
        haystack = tuple(file for file in files if other_side(source.split, file.key) is None)
        if not haystack:
            raise ValueError(f"sources: {source.name}: split: no file of the haystack is of this side; add files")
        return [haystack]
    return [(file,) for file in files]


def plan_units(
    source: AnySource,
    groups: list[tuple[InputFile, ...]],
    seed: int,
    tokenizer: TextTokenizer,
    vision_fingerprint: str | None,
) -> list[Unit]:
    """The units of `source`, whose input is `groups` (hashed). vision_fingerprint: of the vision tokenizer."""
    units = []
    for files in groups:
        read = [(file.key, file.sha256) for file in files]
        ids = tokenizer.fingerprint
        if isinstance(source, Needles):
            made_of = [needles.VERSION, seed, source.model_dump(include=NEEDLE_KEYS), ids, read]
            for start in range(0, source.count, needles.BLOCK):
                stop = min(start + needles.BLOCK, source.count)
                units.append(Unit(source, files, seed, _fingerprint([*made_of, start, stop]), start, stop))
        elif isinstance(source, Qa):
            num_pairs = len(groups[-1])
            of_pairs = qa.pairs_digest(files[:num_pairs], files[num_pairs:])
            options = source.model_dump(include=qa.OPTIONS)
            made_of = ["qa", qa.VERSION, seed, options, ids, of_pairs, read[num_pairs:]]
            if len(files) == num_pairs:  # what is about none of the books
                made_of.append(sorted(file.key for group in groups for file in group))
            units.append(Unit(source, files, seed, _fingerprint(made_of), 0, num_pairs))
        elif isinstance(source, Images | Videos):
            # The table beside a tar of pictures says which to take, not what is in them or how they are called.
            num_coded = 1 if isinstance(source, Images) and files[0].path.endswith(".tar") else len(files)
            coded = _fingerprint(
                [media.VERSION, source.model_dump(include=CODE_KEYS), vision_fingerprint, read[:num_coded]]
            )
            taken = _fingerprint([source.model_dump(include=FILTER_KEYS), read[num_coded:]])
            made_of = [coded, taken, ids, seed, source.name, source.order, source.train]
            codes = f"codes-{coded[:32]}-{taken[:16]}.arrow"
            units.append(Unit(source, files, seed, _fingerprint(made_of), codes=codes))
        elif isinstance(source, LwmJsonl):
            options = source.model_dump(exclude=NO_TOKEN_KEYS)
            units.append(Unit(source, files, seed, _fingerprint([lwm_jsonl.VERSION, options, ids, seed, read])))
        else:
            module = {"books": books, "text": text, "chats": chats, "tokens": tokens}[source.type]
            options = source.model_dump(include=module.OPTIONS)
            units.append(Unit(source, files, seed, _fingerprint([source.type, module.VERSION, options, ids, read])))
    return units


NEEDLE_KEYS = {"name", "type", "tokens", "needles", "asked"}
NO_TOKEN_KEYS = {"path", "share", "pack_with", "overflow", "deduplicate", "decontaminate"}
CODE_KEYS = {"type", "fps", "max_frames", "decoder"}  # of the source, that codes depend on
FILTER_KEYS = {"caption", "min_size", "where", "clips"}


def read_unit(unit: Unit, tokenizer: TextTokenizer, store: Folder) -> Iterator[Record | Rejection]:
    """The unit's records in order. ValueError, at the latest after the last, where a file is not what was hashed.

    store: the token store, where the unit's file of codes lies.
    """
    source = unit.source
    if isinstance(source, Needles):
        yield from needles.read_needles(source, unit.seed, unit.files, unit.start, unit.stop, tokenizer)
        return
    if isinstance(source, Qa):
        yield from qa.read_qa(source, unit.seed, unit.files[: unit.stop], unit.files[unit.stop :], tokenizer)
        return
    if isinstance(source, Images | Videos):
        for item in CodeFile(store.fetch(unit.codes)):
            if isinstance(item, Rejection):
                yield item
            else:
                text_first = media.is_text_first(source.order, unit.seed, source.name, item.key)
                runs = media.media_runs(tokenizer, item.caption, item.codes, text_first, source.train)
                yield Record(item.key, runs)
        return
    for file in unit.files:
        if isinstance(source, Books):
            yield from books.read_book(source, file, tokenizer)
        elif isinstance(source, Text):
            yield from text.read_texts(source, file, tokenizer)
        elif isinstance(source, Chats):
            yield from chats.read_chats(source, file, tokenizer)
        elif isinstance(source, Tokens):
            yield from tokens.read_tokens(source, file, tokenizer)
        else:
            yield from lwm_jsonl.read_lwm_jsonl(source, unit.seed, file, tokenizer)
        check_unchanged(file)


def _fingerprint(made_of: list[object]) -> str:
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
