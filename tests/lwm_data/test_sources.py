"""Sources: records from files, and how they are cut to rows."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lwm_data.folder import DiskFolder
from lwm_data.format.example import Run
from lwm_data.format.vocab import TextTokenizer
from lwm_data.manifest_sources import Books, Chats, Needles, Overflow, Span
from lwm_data.sources.books import read_book
from lwm_data.sources.chats import read_chats
from lwm_data.sources.files import InputFile, find_files, hash_file, open_unpacked, read_text
from lwm_data.sources.fit import fit, num_text_parts
from lwm_data.sources.needles import read_needles
from lwm_data.sources.record import Record, Rejection
from lwm_data.sources.unit import plan_units, read_unit
from lwm_data.token_store import StoreFile, write_store

BOOKS = Books(name="b", type="books", path="x")
CHATS = Chats(name="c", type="chats", path="x")


def _file(path: Path, content: bytes) -> InputFile:
    path.write_bytes(content)
    return InputFile(str(path), path.name)


def _ids(record: Record | Rejection) -> list[int]:
    assert isinstance(record, Record), record
    return [int(token) for run in record.runs for token in run.tokens]


def _trained(record: Record | Rejection) -> list[bool]:
    assert isinstance(record, Record), record
    return [run.trained for run in record.runs for _ in run.tokens]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.ZstdCompressor().compress], ids=["", "gz", "zst"])
def test_a_book_is_bos_text_eos_through_any_compression(
    tmp_path: Path, demo_tokenizer: TextTokenizer, pack: Callable[[bytes], bytes]
) -> None:
    text = "Call me Ishmael.\n\n  Some “years” ago\t— never mind.\n"
    ending = {bytes: ".txt", gzip.compress: ".txt.gz"}.get(pack, ".txt.zst")
    (record,) = read_book(BOOKS, _file(tmp_path / f"moby{ending}", pack(text.encode())), demo_tokenizer)
    ids = _ids(record)
    assert ids[0] == demo_tokenizer.bos and ids[-1] == demo_tokenizer.eos
    assert demo_tokenizer.decode(np.array(ids[1:-1])) == text
    assert _trained(record) == [False] + [True] * (len(ids) - 1)


@pytest.mark.parametrize(
    ("content", "reason", "detail"),
    [
        (b"", "empty", "0 bytes"),
        (b" \n\t\n", "empty", "4 bytes"),
        (b"caf\xe9 au lait", "not UTF-8", "byte 0xe9 at offset 3"),
    ],
)
def test_a_bad_book_is_rejected_with_its_reason(
    tmp_path: Path, demo_tokenizer: TextTokenizer, content: bytes, reason: str, detail: str
) -> None:
    (rejection,) = read_book(BOOKS, _file(tmp_path / "bad.txt", content), demo_tokenizer)
    assert isinstance(rejection, Rejection)
    assert (rejection.key, rejection.reason) == ("bad.txt", reason) and detail in rejection.detail


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_damaged_archive_is_rejected(tmp_path: Path, demo_tokenizer: TextTokenizer, ending: str) -> None:
    (rejection,) = read_book(BOOKS, _file(tmp_path / f"bad.txt{ending}", b"no archive at all"), demo_tokenizer)
    assert isinstance(rejection, Rejection) and rejection.reason == "damaged"


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor().compress], ids=["gz", "zst"])
@pytest.mark.parametrize("num_whole", [0, 1])
def test_a_truncated_archive_is_rejected_wherever_it_ends(
    tmp_path: Path, demo_tokenizer: TextTokenizer, pack: Callable[[bytes], bytes], num_whole: int, corpus_text: str
) -> None:
    packed = pack(corpus_text.encode())
    ending = "gz" if pack is gzip.compress else "zst"
    for kept in (1, 3, len(packed) // 2, len(packed) - 1):
        file = _file(tmp_path / f"a.txt.{ending}", packed * num_whole + packed[:kept])
        (rejection,) = read_book(BOOKS, file, demo_tokenizer)
        assert isinstance(rejection, Rejection) and rejection.reason == "damaged", kept


def test_the_chats_before_the_end_of_a_truncated_archive_are_kept(
    tmp_path: Path, demo_tokenizer: TextTokenizer
) -> None:
    pack = zstandard.ZstdCompressor().compress
    lines = [pack(json.dumps({"data": [f"Hi {i}", "Hello"]}).encode() + b"\n") for i in range(3)]
    found = list(read_chats(CHATS, _file(tmp_path / "c.jsonl.zst", b"".join(lines)[:-2]), demo_tokenizer))
    assert [isinstance(record, Record) for record in found] == [True, True, False]
    assert isinstance(found[2], Rejection) and (found[2].key, found[2].reason) == ("c.jsonl.zst:3", "rest not read")


@given(parts=st.lists(st.binary(max_size=300_000), max_size=4), repeat=st.integers(1, 30))
def test_a_zst_of_several_frames_is_read_to_its_end(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], repeat: int
) -> None:
    skippable = (0x184D2A50).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"notes"
    packed = skippable.join(zstandard.ZstdCompressor().compress(part * repeat) for part in parts)
    path = tmp_path_factory.mktemp("zst") / "a.zst"
    path.write_bytes(packed)
    with open_unpacked(str(path)) as file:
        assert file.read() == b"".join(part * repeat for part in parts)


def test_a_text_larger_than_the_limit_is_rejected_before_it_is_encoded(tmp_path: Path) -> None:
    file = _file(tmp_path / "a.txt.zst", zstandard.ZstdCompressor().compress(b"a" * ((64 << 20) + 1)))
    with pytest.raises(ValueError) as error:
        read_text(file.path)
    assert error.value.args[0] == "too large"


def test_a_file_that_changes_while_it_is_read_gives_no_store_file(
    tmp_path: Path, demo_tokenizer: TextTokenizer, haystack: tuple[InputFile, ...]
) -> None:
    book = hash_file(None, _file(tmp_path / "a.book", b"one text"))
    chat = hash_file(None, _file(tmp_path / "c.jsonl", b'{"data": ["Hi", "Hello"]}'))
    sources: list[Books | Chats | Needles] = [
        BOOKS,
        CHATS,
        _needles(count=1),
    ]
    for source, files in zip(sources, [(book,), (chat,), haystack], strict=True):
        (unit,) = plan_units(source, [files], 0, demo_tokenizer, None)
        for file in files:
            content = Path(file.path).read_bytes()
            Path(file.path).write_bytes(content + b"\n")
        with pytest.raises(ValueError, match="changed while it was read; build again"):
            write_store(tmp_path / unit.file_name, read_unit(unit, demo_tokenizer, DiskFolder(tmp_path)))
        assert not (tmp_path / unit.file_name).exists()


def test_a_chat_trains_the_assistant_and_the_eos_after_it(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    line = json.dumps({"id": "7", "data": ["Hello!", "Good day.", "Bye!", "Farewell."]})
    (record,) = read_chats(CHATS, _file(tmp_path / "c.jsonl", line.encode()), demo_tokenizer)
    assert isinstance(record, Record) and record.key == "7"
    encode, eos = demo_tokenizer.encode, [demo_tokenizer.eos]
    parts: list[tuple[Any, bool]] = [
        ([demo_tokenizer.bos], False),
        (encode("You are a helpful assistant. USER: Hello! ASSISTANT:"), False),
        (encode("Good day."), True),
        (eos, True),
        (encode("USER: Bye! ASSISTANT:"), False),
        (encode("Farewell."), True),
        (eos, True),
    ]
    assert _ids(record) == [int(token) for ids, _ in parts for token in ids]
    assert _trained(record) == [trained for ids, trained in parts for _ in ids]


def test_bad_chats_are_rejected_by_line_and_the_others_kept(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    good = json.dumps({"data": ["Hi", "Hello"]}).encode()
    surrogate = b'{"data": ["\\ud800", "b"]}'
    lines = [good, b"{no json", b"[]", b'{"data": ["one"]}', b'{"data": ["", "x"]}', b'{"data": [1, 2]}', surrogate]
    lines += [b'{"data": ["\xff", "x"]}', b"", good]
    found = list(read_chats(CHATS, _file(tmp_path / "c.jsonl", b"\n".join(lines)), demo_tokenizer))
    keys = [record.key for record in found]
    assert keys == [f"c.jsonl:{n}" for n in (1, 2, 3, 4, 5, 6, 7, 8, 10)]
    reasons = [record.reason if isinstance(record, Rejection) else "kept" for record in found]
    assert reasons == [
        "kept",
        "not JSON",
        "not a chat",
        "not a chat",
        "empty turn",
        "not a chat",
        "not a chat",
        "not UTF-8",
        "kept",
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "\\ud800", "data": ["a", "b"]}', "wrong field"),
        (b'{"id": %s, "data": ["a", "b"]}' % (b"1" * 5000), "not JSON"),
        (b'{"id": 1, "data": [%s1%s, "b"]}' % (b"[" * 900, b"]" * 900), "not a chat"),
        (b"[" * 100_000, "not JSON"),
    ],
    ids=["surrogate", "digits", "deep turn", "deep"],
)
def test_one_hostile_line_is_rejected_and_the_next_kept(
    tmp_path: Path, demo_tokenizer: TextTokenizer, line: bytes, reason: str
) -> None:
    file = _file(tmp_path / "c.jsonl", line + b'\n{"id": "good", "data": ["a", "b"]}\n')
    write_store(tmp_path / "c.arrow", read_chats(CHATS, file, demo_tokenizer))
    store = StoreFile(tmp_path / "c.arrow")
    (rejection,) = store.rejections()
    assert (rejection.key, rejection.reason) == ("c.jsonl:1", reason)
    assert len(store) == 2 and store.key(1) == "good"


def test_a_file_name_that_is_not_utf8_gives_a_key_that_can_be_written(
    tmp_path: Path, demo_tokenizer: TextTokenizer
) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("some text")
    (file,) = find_files(f"{tmp_path}/*.txt", "path")
    assert file.key == "caf\\udce9.txt"
    write_store(tmp_path / "a.arrow", read_book(BOOKS, file, demo_tokenizer))
    assert StoreFile(tmp_path / "a.arrow").key(0) == file.key


def _needles(**keys: object) -> Needles:
    return Needles.model_validate(
        {"name": "n", "type": "needles", "count": 30, "haystack": "x", "tokens": {"min": 200, "max": 400}} | keys
    )


@pytest.fixture
def haystack(tmp_path: Path, corpus_text: str) -> tuple[InputFile, ...]:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(corpus_text[i * 10_000 : (i + 1) * 10_000], encoding="utf-8")
    return tuple(hash_file(None, file) for file in find_files(str(tmp_path / "*.txt"), "haystack"))


def test_needles_are_functions_of_their_index(haystack: tuple[InputFile, ...], demo_tokenizer: TextTokenizer) -> None:
    source = _needles(needles={"min": 2, "max": 4}, asked={"min": 1, "max": 2})
    whole = list(read_needles(source, 5, haystack, 0, 30, demo_tokenizer))
    part = list(read_needles(source, 5, haystack, 11, 17, demo_tokenizer))
    assert [_ids(record) for record in part] == [_ids(record) for record in whole[11:17]]
    other = list(read_needles(source, 6, haystack, 11, 17, demo_tokenizer))
    assert all(_ids(a) != _ids(b) for a, b in zip(part, other, strict=True))
    assert len({tuple(_ids(record)) for record in whole}) == 30


def test_needles_hold_the_fact_they_ask_for_and_train_only_the_answer(
    haystack: tuple[InputFile, ...], demo_tokenizer: TextTokenizer
) -> None:
    depths = []
    for record in read_needles(_needles(), 0, haystack, 0, 30, demo_tokenizer):
        assert isinstance(record, Record)
        bos, prompt, answer, eos = record.runs
        assert [run.trained for run in record.runs] == [False, False, True, True]
        assert (bos.tokens.tolist(), eos.tokens.tolist()) == ([demo_tokenizer.bos], [demo_tokenizer.eos])
        length = len(_ids(record))
        assert 150 <= length <= 400
        text, words = demo_tokenizer.decode(prompt.tokens), demo_tokenizer.decode(answer.tokens)
        city = words.split()[3]
        number = words.rstrip(".").split()[-1]
        assert words == f"The special magic {city} number is: {number}." and len(number) == 7
        assert text.count(f"\nThe special magic {city} number is: {number}\n") == 1
        assert text.endswith(
            f"What is the special magic {city} number? Don't give information outside the document or repeat your "
            "findings. Keep your response short and direct. ASSISTANT:"
        )
        depths.append(text.index(number) / len(text))
    assert min(depths) < 0.35 and max(depths) > 0.5, "facts lie at all depths"


def test_needles_come_close_to_a_fixed_length_and_never_above(
    haystack: tuple[InputFile, ...], demo_tokenizer: TextTokenizer
) -> None:
    source = _needles(tokens=Span(min=1500, max=1500), needles=4, asked=2)
    lengths = [len(_ids(record)) for record in read_needles(source, 0, haystack, 0, 10, demo_tokenizer)]
    assert all(1470 <= length <= 1500 for length in lengths), lengths


def test_needles_without_room_for_the_question_are_refused(
    haystack: tuple[InputFile, ...], demo_tokenizer: TextTokenizer
) -> None:
    with pytest.raises(ValueError, match=r"n: tokens: got 20;.* raise tokens.min"):
        list(read_needles(_needles(tokens=20), 0, haystack, 0, 1, demo_tokenizer))


def test_a_missing_file_names_key_and_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sources.0.path: got .*none/\*.txt: matches no file"):
        find_files(str(tmp_path / "none" / "*.txt"), "sources.0.path")
    with pytest.raises(ValueError, match="no such file"):
        find_files(str(tmp_path / "none.txt"), "sources.0.path")


def test_a_file_that_a_pattern_names_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "book.txt").write_text("A book.")
    assert [file.key for file in find_files(f"{tmp_path}/**/**/*.txt", "path")] == ["a/b/book.txt"]


def test_keys_are_relative_to_the_folder_before_the_first_wildcard(tmp_path: Path) -> None:
    for name in ("en/a.txt", "de/b.txt", "en/deep/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    keys = [file.key for file in find_files(f"{tmp_path}/**/*.txt", "path")]
    assert keys == ["de/b.txt", "en/a.txt", "en/deep/c.txt"]
    assert [file.key for file in find_files(f"file://{tmp_path}/en/*.txt", "path")] == ["a.txt"]
    assert [file.key for file in find_files(f"{tmp_path}/en/a.txt", "path")] == ["a.txt"]


def _record(num_tokens: int) -> Record:
    """BOS 1, then 100, 101, ..., trained, then EOS 2."""
    body = np.arange(100, 100 + num_tokens - 2, dtype=np.int32)
    parts = [(np.array([1], np.int32), False), (body, True), (np.array([2], np.int32), True)]
    return Record("k", tuple(Run(ids, False, trained) for ids, trained in parts))


@given(num_tokens=st.integers(3, 200), row_length=st.integers(2, 60))
def test_parts_of_a_split_record_join_to_the_record(num_tokens: int, row_length: int) -> None:
    record = _record(num_tokens)
    (count,) = num_text_parts(np.array([num_tokens]), row_length, "split").tolist()
    parts = [fit(record, "s", part, row_length, "split") for part in range(count)]
    ids = [[int(token) for run in part.runs for token in run.tokens] for part in parts]
    assert all(len(part) == row_length for part in ids[:-1]) and 2 <= len(ids[-1]) <= row_length
    assert all(part[0] == 1 for part in ids)
    assert [token for part in ids for token in part[1:]] == _ids(record)[1:]
    assert all(part.num_trained == part.num_tokens - 1 and part.part == i for i, part in enumerate(parts))


@pytest.mark.parametrize(("overflow", "wanted"), [("truncate", [1, 1]), ("drop", [1, 0]), ("split", [1, 2])])
def test_a_record_longer_than_a_row_becomes(overflow: Overflow, wanted: list[int]) -> None:
    assert num_text_parts(np.array([10, 11]), 10, overflow).tolist() == wanted
    if overflow == "truncate":
        cut = fit(_record(11), "s", 0, 10, "truncate")
        assert [int(token) for run in cut.runs for token in run.tokens] == [1, *range(100, 109)]
