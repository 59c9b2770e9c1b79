"""Evaluation texts, and whether a record holds a piece of one: n-grams of words, as GPT-3's authors did.

    question   "Who wrote the novel ... ?"  21 words     every 13 words in a row are looked for
    answer     "The cat sat on the mat that day." 8      fewer than 13, 8 or more: the whole is looked for
    answer     "Paris"  1                                fewer than 8: not looked for, it would be everywhere

A text is looked for as it would stand in a record: cleaned and tokenized as the sources are, and back in words.

Hashes of 64 bits: of 10^12 words against 10^7 n-grams one in two builds would meet a false one, and name it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt64

from lwm_data.format.example import text_runs
from lwm_data.format.vocab import TextTokenizer
from lwm_data.manifest import Contamination
from lwm_data.manifest_sources import AnySource, Books, Clean, Text
from lwm_data.record_text import piece_bytes, text_blocks
from lwm_data.sources.clean import clean
from lwm_data.sources.files import InputFile, check_unchanged, find_files, hash_file, read_text
from lwm_data.sources.json_lines import read_json_lines
from lwm_data.sources.record import Record, Rejection
from lwm_data.words import WordNumbers, ngram_hashes, split_words

FIELDS = ("question", "answer", "text")  # of a JSON line, where the manifest names none
MIN_WORDS = 8  # of a text that is looked for as a whole
ENDINGS = (".txt", ".jsonl")
FILTER_BITS = 16  # per n-gram, of the table that most of a text's n-grams are dismissed by


@dataclass(frozen=True)
class Ngrams:
    """All n-grams of one size. hashes: sorted; texts: which text each is of; seen: by a hash's last bits."""

    size: int
    hashes: UInt64[np.ndarray, " n"]
    texts: Int32[np.ndarray, " n"]
    seen: np.ndarray

    def find(self, hashes: UInt64[np.ndarray, " m"]) -> tuple[np.ndarray, np.ndarray]:
        """Places in `hashes` of those that are here, and the number of the text of each."""
        places = np.flatnonzero(self.seen[hashes & np.uint64(len(self.seen) - 1)])
        at = np.minimum(np.searchsorted(self.hashes, hashes[places]), len(self.hashes) - 1)
        right = self.hashes[at] == hashes[places]
        return places[right], self.texts[at[right]]


@dataclass(frozen=True)
class EvaluationTexts:
    """names: of the texts, a file's key with line and field. num_short: texts too short to be looked for."""

    names: tuple[str, ...]
    ngrams: tuple[Ngrams, ...]
    num_short: int


def find_evaluation_files(contamination: Contamination) -> list[InputFile]:
    """The files that `texts` names, hashed, in the manifest's order. ValueError where there are none of a glob."""
    found: dict[InputFile, None] = {}
    for i, pattern in enumerate(contamination.texts):
        for file in find_files(pattern, f"contamination.texts.{i}"):
            if not _unpacked_name(file).endswith(ENDINGS):
                raise ValueError(
                    f"contamination.texts.{i}: got {file.path}; wanted {' or '.join(ENDINGS)}, or these as .gz or .zst"
                )
            found[hash_file(None, file)] = None
    return list(found)


def cleanings_of(sources: Sequence[AnySource]) -> list[Clean]:
    """In which forms evaluation texts can stand in `sources`: as they are, and in each Unicode form in use."""
    forms = {source.clean.unicode for source in sources if isinstance(source, Books | Text) and source.decontaminate}
    return [Clean(unicode=form) for form in (None, "nfc", "nfkc") if form is None or form in forms]


def evaluation_fingerprint(
    contamination: Contamination, files: Sequence[InputFile], tokenizer: TextTokenizer, cleanings: Sequence[Clean]
) -> str:
    """Of all that what is found depends on."""
    of_rule = [MIN_WORDS, contamination.words, contamination.field, [(file.key, file.sha256) for file in files]]
    made_of = [of_rule, tokenizer.fingerprint, [by.unicode for by in cleanings]]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def read_evaluation_texts(
    contamination: Contamination, files: Sequence[InputFile], tokenizer: TextTokenizer, cleanings: Sequence[Clean]
) -> EvaluationTexts:
    """The n-grams of `files`. ValueError where one cannot be read, or holds no text that can be looked for."""
    names: list[str] = []
    by_size: dict[int, list[tuple[np.ndarray, int]]] = {}
    num_short = 0
    number_of = WordNumbers()
    table = piece_bytes(tokenizer)
    least = min(MIN_WORDS, contamination.words)
    for file in files:
        num_before = len(names)
        for name, text in _texts(file, contamination.field):
            is_long = False
            for cleaned in dict.fromkeys(clean(text, by)[0] for by in cleanings):
                words = _words_in_record(cleaned, tokenizer, table)
                size = min(contamination.words, len(words))
                if size >= least:
                    by_size.setdefault(size, []).append((ngram_hashes(number_of(words), size), len(names)))
                    is_long = True
            if is_long:
                names.append(name)
            else:
                num_short += 1
        if len(names) == num_before:
            raise ValueError(f"contamination.texts: {file.path}: no text in it has {least} words, so none can be found")
        check_unchanged(file)
    return EvaluationTexts(tuple(names), tuple(_ngrams(size, by_size[size]) for size in sorted(by_size)), num_short)


def _words_in_record(text: str, tokenizer: TextTokenizer, table: list[bytes]) -> list[str]:
    """The words that are left of `text` once it is tokenized: a tokenizer may change or not know its characters."""
    record = Record("", text_runs(tokenizer, [(tokenizer.encode(text), True)], eos=True))
    return [word for block in text_blocks(record, table) for word in split_words(block)]


def _ngrams(size: int, of_texts: list[tuple[np.ndarray, int]]) -> Ngrams:
    hashes = np.concatenate([hashes for hashes, _ in of_texts])
    texts = np.concatenate([np.full(len(hashes), number, np.int32) for hashes, number in of_texts])
    hashes, firsts = np.unique(hashes, return_index=True)  # the first text that has it
    seen = np.zeros(1 << (max(1, len(hashes)) * FILTER_BITS - 1).bit_length(), np.bool_)
    seen[hashes & np.uint64(len(seen) - 1)] = True
    return Ngrams(size, hashes, texts[firsts], seen)


def _unpacked_name(file: InputFile) -> str:
    return file.path.removesuffix(".gz").removesuffix(".zst")


def _texts(file: InputFile, field: str | None) -> Iterator[tuple[str, str]]:
    """(name, text) of each text in `file`."""
    if _unpacked_name(file).endswith(".txt"):
        try:
            yield file.key, read_text(file.path)
        except ValueError as error:
            reason, detail = error.args
            raise ValueError(f"contamination.texts: {file.path}: {reason}: {detail}") from error
        return
    for line in read_json_lines(file):
        if isinstance(line, Rejection):
            raise ValueError(f"contamination.texts: {line.key}: {line.reason}: {line.detail}")
        found = list(_fields(line.value, (field,) if field else FIELDS))
        if not found:
            wanted = field or ", ".join(FIELDS)
            raise ValueError(
                f"contamination.texts: {line.key}: no text in {wanted}; name the field by contamination.field"
            )
        for name, text in found:
            yield f"{line.key} {name}", text


def _fields(value: Any, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The strings under `names`; of a list of strings, each."""
    for name in names if isinstance(value, dict) else ():
        held = value.get(name)
        for text in held if isinstance(held, list) else [held]:
            if isinstance(text, str):
                yield name, text
