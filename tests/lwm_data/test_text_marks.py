"""Marks of single texts: what they depend on, and what not."""

from __future__ import annotations

import hashlib
import re
import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from datasketch import MinHash
from hypothesis import given
from hypothesis import strategies as st

from lwm_data import record_text, text_marks
from lwm_data.folder import DiskFolder
from lwm_data.format.example import Run, text_runs
from lwm_data.format.vocab import TextTokenizer
from lwm_data.record_text import piece_bytes, text_blocks
from lwm_data.sources.record import Record, Rejection
from lwm_data.text_marks import Marking, Marks, MarksFile, MarkUnit, mark_record, mark_unit
from lwm_data.token_store import write_store

UNIT = MarkUnit("store.arrow", "marks.arrow", near=True, evaluation=False)
TEXTS = st.text(
    st.one_of(st.sampled_from(" \n\té\u0301e.,'’_-“A漢字"), st.characters(exclude_categories=["Cs"])), max_size=200
)


def record_of(tokenizer: TextTokenizer, *texts: str) -> Record:
    return Record("key", text_runs(tokenizer, [(tokenizer.encode(text), True) for text in texts], eos=True))


def marks_of(tokenizer: TextTokenizer, *texts: str) -> Marks:
    return mark_record(Marking(DiskFolder(Path()), tokenizer, None), UNIT, record_of(tokenizer, *texts))


def shares(one: Marks, other: Marks) -> float:
    assert one.signature and other.signature
    return float((np.frombuffer(one.signature, "<u4") == np.frombuffer(other.signature, "<u4")).mean())


def reference_text(text: str) -> str:
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip()


@given(text=TEXTS)
def test_the_blocks_are_the_text_that_went_in(demo_tokenizer: TextTokenizer, text: str) -> None:
    decoded = demo_tokenizer.decode(demo_tokenizer.encode(text))
    blocks = text_blocks(record_of(demo_tokenizer, text), piece_bytes(demo_tokenizer))
    assert "".join(blocks) == " ".join(unicodedata.normalize("NFC", decoded).split())


def test_where_blocks_are_cut_changes_no_mark(
    demo_tokenizer: TextTokenizer, corpus_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = corpus_text[:8000]
    whole = marks_of(demo_tokenizer, text)
    for block_tokens, chunk in ((1, 1), (7, 3), (1000, 100)):
        monkeypatch.setattr(record_text, "BLOCK_TOKENS", block_tokens)
        monkeypatch.setattr(record_text, "BLOCK_CHARS", 1)
        monkeypatch.setattr(text_marks, "CHUNK", chunk)
        assert marks_of(demo_tokenizer, text) == whole


def test_a_stretch_without_blanks_is_read_in_bounded_memory(
    demo_tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_text, "BLOCK_TOKENS", 100)
    monkeypatch.setattr(record_text, "BLOCK_CHARS", 1)
    monkeypatch.setattr(record_text, "MAX_WORD", 1000)
    blocks = list(text_blocks(record_of(demo_tokenizer, "x" * 50_000), piece_bytes(demo_tokenizer)))
    assert "".join(blocks) == "x" * 50_000 and max(map(len, blocks)) < 3000


@pytest.mark.parametrize("word", ["x" * 9000, "e\u0301" * 3000, "\u1100\u1161\u11a8" * 2000, "a\tb\u3000c" * 900])
def test_where_a_stretch_without_blanks_is_cut_changes_no_content(
    demo_tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    wanted = hashlib.blake2b(reference_text(word).encode(), digest_size=16).digest()
    monkeypatch.setattr(record_text, "BLOCK_CHARS", 1)
    monkeypatch.setattr(record_text, "MAX_WORD", 1000)
    for block_tokens in (1, 100, 997):
        monkeypatch.setattr(record_text, "BLOCK_TOKENS", block_tokens)
        assert marks_of(demo_tokenizer, word).content == wanted
        assert marks_of(demo_tokenizer, f"\n{word}").content == wanted


def test_a_longer_book_takes_no_more_memory(demo_tokenizer: TextTokenizer, corpus_text: str) -> None:
    ids = demo_tokenizer.encode(corpus_text)
    shared = Marking(DiskFolder(Path()), demo_tokenizer, None)
    peaks = []
    for times in (4, 4, 40):  # once to fill what is kept: the words' numbers
        record = Record("key", text_runs(demo_tokenizer, [(np.tile(ids, times), True)], eos=True))
        tracemalloc.start()
        mark_record(shared, UNIT, record)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.5 * peaks[1] + 2**20


def test_the_content_is_the_text_s_hash(demo_tokenizer: TextTokenizer, corpus_text: str) -> None:
    wanted = hashlib.blake2b(reference_text(corpus_text).encode(), digest_size=16).digest()
    assert marks_of(demo_tokenizer, corpus_text).content == wanted


def test_white_space_and_unicode_s_forms_change_no_content_but_case_does(demo_tokenizer: TextTokenizer) -> None:
    plain = marks_of(demo_tokenizer, "Caf\u00e9 au lait, at once.")
    assert marks_of(demo_tokenizer, "  Cafe\u0301\n au\tlait,  at once.\n") == plain
    upper = marks_of(demo_tokenizer, "CAF\u00c9 AU LAIT -- at once")
    assert upper.content != plain.content
    assert shares(upper, plain) == 1


def test_the_signature_is_datasketch_s_of_the_word_sequences(demo_tokenizer: TextTokenizer, corpus_text: str) -> None:
    """datasketch with its own hash function, of the words themselves: both estimate the same similarity."""
    one, other = corpus_text[:20_000], corpus_text[4_000:24_000]
    sets, sketches = [], []
    for text in (one, other):
        words = re.findall(r"[a-z0-9]+", text.lower())
        shingles = {" ".join(words[i : i + 5]).encode() for i in range(len(words) - 4)}
        sketch = MinHash(num_perm=1024)
        sketch.update_batch(shingles)
        sets.append(shingles)
        sketches.append(sketch)
    true = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    assert abs(sketches[0].jaccard(sketches[1]) - true) < 0.06
    assert abs(shares(marks_of(demo_tokenizer, one), marks_of(demo_tokenizer, other)) - true) < 0.13


def test_marks_are_the_same_on_every_machine(demo_tokenizer: TextTokenizer) -> None:
    """If this fails, another datasketch or another hash gives other marks: raise text_marks.VERSION."""
    marks = marks_of(demo_tokenizer, "It was the best of times, it was the worst of times.")
    assert marks.content is not None and marks.signature is not None
    assert marks.content.hex() == "29d3ccfcd991526dc0772473df47f6c1"
    assert hashlib.sha256(marks.signature).hexdigest()[:32] == "c507d557d862ca485a5fb4324e5117f8"


def test_a_chat_is_all_its_words(demo_tokenizer: TextTokenizer) -> None:
    one = marks_of(demo_tokenizer, "USER: What is two and two?", "It is four.")
    other = marks_of(demo_tokenizer, "USER: What is one and three?", "It is four.")
    assert one.content != other.content
    assert shares(one, other) < 1


def test_of_pictures_the_codes_count_whatever_their_order(demo_tokenizer: TextTokenizer) -> None:
    caption = demo_tokenizer.encode("A cat on a mat.")
    codes = [np.full(256, i, np.int32) for i in range(2)]

    def marks(picture: np.ndarray, text_first: bool) -> Marks:
        runs = (Run(caption, False, True), Run(picture, True, True))
        record = Record("key", runs if text_first else runs[::-1])
        return mark_record(Marking(DiskFolder(Path()), demo_tokenizer, None), UNIT, record)

    assert marks(codes[0], True) == marks(codes[0], False)
    assert marks(codes[0], True).content != marks(codes[1], True).content
    assert marks(codes[0], True).signature is None


def test_a_file_gives_back_the_marks_of_every_record(
    tmp_path: Path, demo_tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_marks, "BATCH", 3)
    texts = [f"This is text number {i} of them all." for i in range(7)] + ["..."]
    records: list[Record | Rejection] = [record_of(demo_tokenizer, text) for text in texts]
    records.insert(2, Rejection("bad", "not UTF-8", "byte"))
    write_store(tmp_path / UNIT.store, records)
    assert mark_unit(Marking(DiskFolder(tmp_path), demo_tokenizer, None), UNIT) == len(records)
    file = MarksFile(tmp_path / UNIT.name)
    contents, has_content = file.contents()
    signatures, has_signature = file.signatures()
    assert len(file) == len(records) and list(file.found()) == []
    wanted = [marks_of(demo_tokenizer, text) for text in texts]
    wanted.insert(2, Marks())
    got = [
        Marks(content.tobytes() if has_content[i] else None, signature.tobytes() if has_signature[i] else None)
        for i, (content, signature) in enumerate(zip(contents, signatures, strict=True))
    ]
    assert got == wanted


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "marks.arrow").write_bytes(b"ARROW1\0\0 not quite")
    with pytest.raises(ValueError, match=r"marks\.arrow: damaged marks file"):
        MarksFile(tmp_path / "marks.arrow")
