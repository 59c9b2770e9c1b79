"""Texts of every kind of file are the same records, whatever is broken beside them, and a split shares none."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lwm_data.build import build, describe
from lwm_data.format.dataset import open_dataset
from lwm_data.format.vocab import TextTokenizer
from lwm_data.manifest import read_dataset_manifest
from lwm_data.manifest_sources import Clean, Split, Text
from lwm_data.sources import json_lines
from lwm_data.sources.clean import clean, strip_gutenberg
from lwm_data.sources.columns import read_rows
from lwm_data.sources.files import InputFile, find_files, open_unpacked
from lwm_data.sources.heldout import is_heldout
from lwm_data.sources.json_array import read_json_array
from lwm_data.sources.record import UNREAD, Record, Rejection
from lwm_data.sources.text import group_texts, read_texts
from lwm_data.sources.unit import group_input

ROOT = Path(__file__).parents[2]
TEXTS = ["Call me Ishmael.", "Ümlaut – “quoted”\nand a second line", "  a blank before"]
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def _source(**keys: Any) -> Text:
    return Text.model_validate({"name": "t", "type": "text", "path": "x"} | keys)


def _file(path: Path, data: bytes) -> InputFile:
    path.write_bytes(data)
    return InputFile(str(path), path.name)


def _tar(members: dict[str, bytes]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return raw.getvalue()


def _write(folder: Path, kind: str, texts: Sequence[str], packed: str = "") -> InputFile:
    """A file of `kind` that holds `texts`, packed; the extension of a lines file is `txt`."""
    rows = [{"id": f"r{i}", "text": of} for i, of in enumerate(texts)]
    if kind in ("parquet", "arrow"):
        table = pa.Table.from_pylist(rows, pa.schema({"id": pa.string(), "text": pa.string()}))
        path = folder / f"a.{kind}"
        if kind == "parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table)
        return InputFile(str(path), path.name)
    data = {
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "json": json.dumps(rows, indent=2).encode(),
        "tar": _tar({f"r{i}.txt": of.encode() for i, of in enumerate(texts)}),
    }[kind]
    return _file(folder / f"a.{kind}{packed}", PACKERS[packed](data))


def _decoded(tokenizer: TextTokenizer, record: Record | Rejection) -> str:
    assert isinstance(record, Record), record
    ids = np.concatenate([run.tokens for run in record.runs])
    assert (ids[0], ids[-1]) == (tokenizer.bos, tokenizer.eos)
    assert [run.trained for run in record.runs for _ in run.tokens] == [False] + [True] * (len(ids) - 1)
    return tokenizer.decode(ids[1:-1])


@pytest.mark.parametrize("kind", ["jsonl", "json", "tar", "parquet", "arrow"])
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_the_same_texts_come_from_every_kind_of_file(
    tmp_path: Path, demo_tokenizer: TextTokenizer, kind: str, packed: str
) -> None:
    if packed and kind in ("parquet", "arrow"):
        return  # packed inside
    file = _write(tmp_path, kind, TEXTS, packed)
    records = list(read_texts(_source(), file, demo_tokenizer))
    assert [_decoded(demo_tokenizer, record) for record in records] == TEXTS
    prefix = f"{file.key}/" if kind == "tar" else ""
    assert [record.key for record in records] == [f"{prefix}r{i}" for i in range(3)]


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_a_plain_file_is_one_record_or_one_a_line(tmp_path: Path, demo_tokenizer: TextTokenizer, packed: str) -> None:
    file = _file(tmp_path / f"a.txt{packed}", PACKERS[packed](b"\xef\xbb\xbfone\r\n\n  \ntwo"))
    (whole,) = read_texts(_source(), file, demo_tokenizer)
    assert (whole.key, _decoded(demo_tokenizer, whole)) == (f"a.txt{packed}", "one\r\n\n  \ntwo")
    lines = list(read_texts(_source(records="lines"), file, demo_tokenizer))
    assert [(line.key, _decoded(demo_tokenizer, line)) for line in lines] == [
        (f"a.txt{packed}:1", "one"),
        (f"a.txt{packed}:4", "two"),
    ]


@given(texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=50), max_size=30))
def test_an_array_gives_the_elements_that_the_json_module_gives(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    values: list[Any] = [{"text": of, "n": [i, -1.5, None, {"a": "]}"}]} for i, of in enumerate(texts)]
    values += [1234567, "a", True, []]
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(json.dumps(values, ensure_ascii=False, indent=len(texts) % 3 or None), encoding="utf-8")
    found = list(read_json_array(InputFile(str(path), "a.json")))
    assert [element.value for element in found if not isinstance(element, Rejection)] == values
    assert [element.key for element in found] == [f"a.json:{i + 1}" for i in range(len(values))]


@pytest.mark.parametrize(
    ("data", "wanted", "reason"),
    [
        (b'[{"a": 1}, {"a": 2', 1, "rest not read"),
        (b'[{"a": 1} {"a": 2}]', 1, "rest not read"),
        (b'[{"a": 1}, {"a": 2}', 2, "rest not read"),
        (b'[{"a": 1}] []', 1, "rest not read"),
        (b"[1, 2, nul]", 2, "rest not read"),
        (b'[1, "\xff"]', 0, "rest not read"),
        (b"[" * 100_000, 0, "rest not read"),
        (b"{}", 0, "rest not read"),
        (b"[]", 0, None),
    ],
)
def test_what_breaks_an_array_is_told_after_the_elements_before_it(
    tmp_path: Path, data: bytes, wanted: int, reason: str | None
) -> None:
    found = list(read_json_array(_file(tmp_path / "a.json", data)))
    told = [element for element in found if isinstance(element, Rejection)]
    assert len(found) - len(told) == wanted
    assert [(of.key, of.reason) for of in told] == ([(f"a.json:{wanted + 1}", reason)] if reason else [])


def test_an_element_or_a_line_above_the_limit_is_a_rejection(
    tmp_path: Path, demo_tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lwm_data.sources.json_array.MAX_LINE", 1 << 20)
    big = json.dumps([{"text": "a"}, {"text": "b" * (3 << 20)}, {"text": "c"}]).encode()
    one, two = read_texts(_source(), _file(tmp_path / "a.json", big), demo_tokenizer)
    assert isinstance(one, Record) and isinstance(two, Rejection) and (two.key, two.reason) == ("a.json:2", UNREAD)
    monkeypatch.setattr(json_lines, "MAX_LINE", 1 << 20)
    lines = b'{"text": "a"}\n{"text": "%s"}\n{"text": "c"}\n' % (b"b" * (3 << 20))
    found = list(read_texts(_source(), _file(tmp_path / "a.jsonl", lines), demo_tokenizer))
    assert [of.reason if isinstance(of, Rejection) else of.key for of in found] == [
        "a.jsonl:1",
        "too large",
        "a.jsonl:3",
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"txt": "a"}, "missing field"),
        ({"text": None}, "missing field"),
        ({"text": 7}, "wrong field"),
        ({"text": " \n"}, "empty"),
        ([], "not an object"),
        ({"text": "\ud800"}, "not UTF-8"),
    ],
)
def test_a_broken_row_is_told_and_the_next_is_kept(
    tmp_path: Path, demo_tokenizer: TextTokenizer, row: Any, reason: str
) -> None:
    file = _file(tmp_path / "a.jsonl", f'{json.dumps(row)}\n{{"text": "good"}}\n'.encode())
    bad, good = read_texts(_source(), file, demo_tokenizer)
    assert isinstance(bad, Rejection) and (bad.key, bad.reason) == ("a.jsonl:1", reason)
    assert _decoded(demo_tokenizer, good) == "good"


def test_a_key_that_is_asked_for_must_be_there(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    file = _file(tmp_path / "a.jsonl", b'{"url": "u", "id": 1, "text": "a"}\n{"id": 2, "text": "b"}\n')
    named, without = read_texts(_source(key="url"), file, demo_tokenizer)
    assert named.key == "u"
    assert isinstance(without, Rejection) and (without.key, without.reason) == ("a.jsonl:2", "missing field")


def test_samples_of_a_tar_hold_a_text_or_json_and_a_cut_is_told(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    members = {
        "a.txt": b"plain",
        "b.json": b'{"body": "of json", "id": "B"}',
        "c.jpg": b"no text",
        "d.json": b"{",
        "e.txt": b"\xff",
        "f.txt": b"f" * 2000,
    }
    wanted = [("x.tar/a", None), ("B", None), ("x.tar/c", "no text"), ("x.tar/d", "not JSON"), ("x.tar/e", "not UTF-8")]
    for packed in ("", ".gz", ".zst"):
        for cut in (0, 11_000):
            data = _tar(members)
            data = data[: 512 * 12 + 700] if cut else data
            file = _file(tmp_path / f"x.tar{packed}", PACKERS[packed](data))
            found = list(read_texts(_source(field="body"), InputFile(file.path, "x.tar"), demo_tokenizer))
            told = [(of.key, of.reason if isinstance(of, Rejection) else None) for of in found]
            last = ("x.tar", UNREAD) if cut else ("x.tar/f", None)
            assert told[-1] == last and [of for of in told[:-1]] == wanted[: len(told) - 1]
            assert cut or len(told) == 6


def test_a_folder_that_datasets_saved_is_read_by_its_name(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    saved = tmp_path / "corpus"
    datasets.Dataset.from_dict({"text": TEXTS, "more": [1, 2, 3]}).save_to_disk(str(saved))
    (saved / "cache-1.arrow").write_bytes(b"not of the dataset")
    for path in (str(saved), f"file://{saved}"):
        (file,) = find_files(path, "path")
        assert file.key == "corpus/data-00000-of-00001.arrow"
        records = list(read_texts(_source(), file, demo_tokenizer))
        assert [_decoded(demo_tokenizer, record) for record in records] == TEXTS
    (saved / "state.json").write_text('{"_data_files": [{"filename": "../../etc/passwd"}]}')
    with pytest.raises(ValueError, match="wanted names of files beside it"):
        find_files(str(saved), "path")
    (saved / "state.json").write_text("[]")
    with pytest.raises(ValueError, match=r"state.json: not what `datasets` writes"):
        find_files(str(saved), "path")


def test_a_hub_name_without_a_network_is_the_user_s_error() -> None:
    with pytest.raises(ValueError, match=r"sources.0.path: got hf://datasets/a/b/\*.parquet: .*check the network"):
        find_files("hf://datasets/a/b/*.parquet", "sources.0.path")


@pytest.mark.parametrize("folder", ["my[corpus]", "what?", "star*", "[!a]"])
def test_the_manifest_s_own_folder_is_never_a_pattern(
    project: Callable[..., Path], demo_tokenizer: TextTokenizer, folder: str
) -> None:
    manifest = project(folder)
    plain = describe(read_dataset_manifest(project("plain")), project("plain").parent)
    assert describe(read_dataset_manifest(manifest), manifest.parent) == plain
    keys = [file.key for file in find_files(read_dataset_manifest(manifest).sources[0].path, "p")]  # type: ignore[union-attr]
    assert keys == [f"book{i}.txt" for i in range(4)]
    one = read_dataset_manifest(manifest, ["sources.0.path=books/book1.txt"]).sources[0]
    assert [file.key for file in find_files(one.path, "p")] == ["book1.txt"]  # type: ignore[union-attr]


@given(
    texts=st.lists(st.binary(min_size=1, max_size=3000).map(bytes.hex), min_size=1, max_size=60), place=st.integers(0)
)
def test_every_line_before_the_damage_of_a_gz_is_kept(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], place: int
) -> None:
    lines = [json.dumps({"text": of}).encode() + b"\n" for of in texts]
    packed = bytearray(b"".join(gzip.compress(line) for line in lines))
    starts = np.cumsum([0, *(len(gzip.compress(line)) for line in lines)])
    place %= len(packed)
    member = int(np.searchsorted(starts, place, side="right")) - 1
    packed[int(starts[member]) : int(starts[member]) + 10] = b"\xff" * 10  # the header of a member
    path = tmp_path_factory.mktemp("gz") / "a.jsonl.gz"
    path.write_bytes(packed)
    found = list(json_lines.read_json_lines(InputFile(str(path), "a.jsonl.gz")))
    assert [line.value["text"] for line in found[:-1] if not isinstance(line, Rejection)] == texts[:member]
    assert isinstance(found[-1], Rejection) and (found[-1].reason, len(found)) == (UNREAD, member + 1)


def test_all_that_stands_before_a_cut_of_a_gz_is_unpacked(tmp_path: Path, corpus_text: str) -> None:
    lines = [json.dumps({"text": corpus_text[i : i + 80], "n": i}) for i in range(0, 40_000, 20)]
    packed = gzip.compress("\n".join(lines).encode())
    for cut in (len(packed) // 3, len(packed) - 9, len(packed) - 1):
        file = _file(tmp_path / "a.jsonl.gz", packed[:cut])
        found = list(json_lines.read_json_lines(file))
        assert isinstance(found[-1], Rejection) and found[-1].reason == UNREAD
        kept = [json.dumps(line.value) for line in found[:-1] if not isinstance(line, Rejection)]
        assert kept == lines[: len(kept)] and len(kept) >= len(lines) * cut // len(packed) * 0.9 - 1


@given(st.lists(st.binary(max_size=100_000), max_size=4), st.integers(0, 600))
def test_a_gz_of_several_padded_members_is_read_to_its_end(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], padding: int
) -> None:
    path = tmp_path_factory.mktemp("gz") / "a.gz"
    path.write_bytes(b"".join(gzip.compress(part) + bytes(padding) for part in parts))
    with open_unpacked(str(path)) as file:
        assert file.read() == b"".join(parts)


HEADERS = [
    "The Project Gutenberg EBook of X\n\n*** START OF THIS PROJECT GUTENBERG EBOOK X ***\n\n",
    "\ufeffblah\r\n*** START OF THE PROJECT GUTENBERG EBOOK\r\nOF TWO LINES ***\r\n",
    "***START OF THE PROJECT GUTENBERG ETEXT X***\n",
    "**Welcome**\n*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n\n",
]
FOOTERS = [
    "\n\n*** END OF THE PROJECT GUTENBERG EBOOK X ***\nlicence\n",
    "\n\nEnd of the Project Gutenberg EBook of X, by Y\n\n*** END OF THIS PROJECT GUTENBERG EBOOK X ***\nlicence",
    "\r\n\r\nEnd of Project Gutenberg's X, by Y\r\n",
]


@given(
    header=st.sampled_from(["", *HEADERS]), footer=st.sampled_from(["", *FOOTERS]), body=st.text("ab*\n .", min_size=1)
)
def test_gutenberg_s_marks_are_cut_off_and_a_missing_one_is_told(header: str, footer: str, body: str) -> None:
    body = f"Chapter {body} end."
    got, missing = strip_gutenberg(header + body + footer)
    assert missing == {(0, 0): "start and the end", (0, 1): "start", (1, 0): "end"}.get(
        (bool(header), bool(footer)), ""
    )
    assert got == (body + "\n" if header or footer else body)


def test_small_print_at_the_end_takes_no_text() -> None:
    text = "A story.\n*END THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n"
    assert strip_gutenberg(text) == (text, "start and the end")


def test_cleaning_is_a_choice_and_what_it_finds_is_noted(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    raw = unicodedata.normalize("NFD", "é ﬁ")
    for form in ("nfc", "nfkc"):
        assert clean(raw, Clean(unicode=form)) == (unicodedata.normalize(form.upper(), raw), None)  # type: ignore[arg-type]
    file = _file(tmp_path / "a.jsonl", json.dumps({"text": HEADERS[0] + "x"}).encode() + b'\n{"text": "\\n"}')
    noted, empty = read_texts(_source(clean={"gutenberg": True}), file, demo_tokenizer)
    assert _decoded(demo_tokenizer, noted) == "x\n" and isinstance(noted, Record)
    assert noted.note == ("no Gutenberg mark", "no mark of the end was found; nothing is cut off there")
    assert isinstance(empty, Rejection) and empty.reason == "empty"


@given(keys=st.lists(st.text(max_size=20), max_size=50), seed=st.integers(0, 5), share=st.floats(0.01, 0.99))
def test_the_two_sides_share_no_key_and_miss_none(keys: list[str], seed: int, share: float) -> None:
    more = min(0.995, share * 1.5)
    for key in keys:
        sides = [is_heldout(Split(heldout=share, take=take, seed=seed), key) for take in ("train", "heldout")]
        assert sides[0] == sides[1], "a function of key and seed"
        assert not sides[0] or is_heldout(Split(heldout=more, take="train", seed=seed), key), "nested"


def test_a_split_holds_out_its_share() -> None:
    split = Split(heldout=0.1, take="train")
    assert 900 < sum(is_heldout(split, f"book{i}.txt") for i in range(10_000)) < 1100
    assert all(is_heldout(split, f"b{i}.txt") == is_heldout(split, f"b{i}.txt.zst") for i in range(200))


def test_two_datasets_of_one_split_share_no_document_whatever_they_are_called(
    project: Callable[..., Path], tmp_path: Path
) -> None:
    lines = [json.dumps({"id": f"d{i}", "text": f"This is document {i}."}) for i in range(200)]
    found = []
    for name, take in (("one", "train"), ("two", "heldout")):
        split = {"heldout": 0.2, "take": take}
        manifest = project(name, sources=[{"name": name, "type": "text", "path": "*.jsonl.gz", "split": split}])
        order = lines if take == "train" else lines[::-1]
        for part in range(3 if take == "train" else 1):
            data = "\n".join(order[part::3] if take == "train" else order)
            (manifest.parent / f"{name}-{part}.jsonl.gz").write_bytes(gzip.compress(data.encode()))
        result = build(manifest)
        examples = [pq.read_table(path)["key"].to_pylist() for path in sorted(result.out.glob("*.examples.parquet"))]
        found.append({key for keys in examples for key in keys})
        counts = result.info.sources[name]
        assert counts.records == 200 == counts.kept + counts.rejected
        assert counts.reasons == {"filtered: split": counts.rejected}
    assert not found[0] & found[1] and len(found[0] | found[1]) == 200 and 20 < len(found[1]) < 60


def test_every_record_is_kept_split_truncated_or_rejected(project: Callable[..., Path], corpus_text: str) -> None:
    texts = ["short", corpus_text[:3000], "", corpus_text[:9000], "again"]
    chats = [{"conversations": [{"from": "gpt", "value": "Hi."}, {"from": "human", "value": "a"}]}]
    chats[0]["conversations"].append({"from": "gpt", "value": "b"})
    chats.append({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": corpus_text[:4000]}]})
    sources = [
        {"name": "cut", "type": "text", "path": "t.jsonl", "overflow": "truncate"},
        {"name": "parts", "type": "text", "path": "t.jsonl", "overflow": "split", "tokens": {"max": 2000}},
        {"name": "talk", "type": "chats", "path": "c.jsonl"},
    ]
    manifest = project(sources=sources, max_rejected=0.5)
    for name, rows in (("t", [{"text": of} for of in texts]), ("c", chats)):
        (manifest.parent / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    info = open_dataset(build(manifest).out).info
    table = {name: (of.records, of.kept, of.split, of.truncated, of.rejected) for name, of in info.sources.items()}
    assert table == {"cut": (5, 2, 0, 2, 1), "parts": (5, 2, 1, 0, 2), "talk": (2, 1, 0, 0, 1)}
    assert info.sources["cut"].reasons == {"empty": 1, "truncated": 2}
    assert info.sources["parts"].reasons == {"empty": 1, "split": 1, "too long": 1}
    assert info.sources["talk"].reasons == {"longer than a row": 1, "turn left out": 1}
    assert info.rejected == {"empty": 2, "longer than a row": 1, "split": 1, "too long": 1} | {
        "truncated": 2,
        "turn left out": 1,
    }
    card = (manifest.parent / "out" / "README.md").read_text()
    assert "cut: empty 1, truncated 2; parts: empty 1, split 1, too long 1" in card


@given(lengths=st.lists(st.integers(1, 2_000_000), max_size=50))
def test_every_length_is_in_at_most_one_stage(lengths: list[int]) -> None:
    stages = []
    for name in ("32k", "128k", "256k", "512k", "1m"):
        (source,) = read_dataset_manifest(ROOT / "manifests" / "lwm-text" / f"{name}.yaml").sources
        assert isinstance(source, Text)
        stages.append(source.tokens)
    assert [of.min for of in stages] == [10_000, 100_000, 200_000, 500_000, 1_000_000]
    for length in [*lengths, *(of.min for of in stages)]:
        taken = [of.min <= length and (of.max is None or length < of.max) for of in stages]
        assert sum(taken) == (length >= 10_000)


def test_a_length_range_is_half_open(project: Callable[..., Path]) -> None:
    sources = [{"name": "t", "type": "text", "path": "t.txt", "records": "lines", "tokens": {"min": 2, "max": 10}}]
    manifest = project(sources=sources, max_rejected=1)
    (manifest.parent / "t.txt").write_text("1 2 3\n")
    build(manifest)
    length = open_dataset(manifest.parent / "out").info.num_tokens
    for least, most, kept in ((length, length + 1, True), (2, length, False)):
        changed = [f"sources.0.tokens={{min: {least}, max: {most}}}"]
        if kept:
            assert build(manifest, changed).info.sources["t"].kept == 1
        else:
            with pytest.raises(ValueError, match="no record is left"):
                build(manifest, changed)
    with pytest.raises(ValueError, match=r"wanted min < max \(got min 5, max 5\); max itself is not taken"):
        read_dataset_manifest(manifest, ["sources.0.tokens={min: 5, max: 5}"])


def test_small_files_are_few_units_and_a_new_one_changes_one(tmp_path: Path) -> None:
    files = [InputFile(f"/d/{i:05d}.txt", f"{i:05d}.txt") for i in range(5000)]
    units = group_texts(_source(), files)
    assert 5 < len(units) < 60 and [file for unit in units for file in unit] == files
    more = group_texts(_source(), sorted([*files, InputFile("/d/02000a.txt", "02000a.txt")], key=lambda of: of.path))
    assert len(set(units) - set(more)) == 1
    assert group_texts(_source(records="lines"), files[:3]) == [(file,) for file in files[:3]]


def test_a_name_that_ends_as_those_of_datasets_is_a_text(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    names = ["real-estate.json", "my_stats.json", "a.state.json", "state.json", "dataset_info.json", "00000_stats.json"]
    files = [_file(tmp_path / name, b'[{"text": "a"}]') for name in names]
    assert group_texts(_source(), files) == [(file,) for file in files[:3]]


def test_members_of_a_tar_without_an_ending_are_told(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    file = _file(tmp_path / "x.tar", _tar({"LICENSE": b"words", "a.txt": b"a", "b/chapter": b"b", "b/.hidden": b""}))
    found = list(read_texts(_source(), file, demo_tokenizer))
    told = {(of.key, of.reason) for of in found if isinstance(of, Rejection)}
    assert told == {("x.tar/LICENSE", "no text"), ("x.tar/b/chapter", "no text")}
    assert [of.key for of in found if isinstance(of, Record)] == ["x.tar/a"]


def test_long_rows_of_a_parquet_are_held_a_few_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"{i}" * (4 << 20) for i in range(10, 30)]
    pq.write_table(pa.table({"text": texts}), path, use_dictionary=False)
    rows = [row for row in read_rows(InputFile(str(path), "a.parquet"), 64) if not isinstance(row, Rejection)]
    assert [row.fields["text"][:2] for row in rows] == [text[:2] for text in texts]
    assert max(row.batch.nbytes for row in rows) <= 32 << 20


BROKEN = {
    "cut.jsonl.gz": lambda rows: gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())[:-40],
    "cut.tar": lambda rows: _tar({f"{i}.txt": row["text"].encode() for i, row in enumerate(rows)})[:9_000],
    "bad.json": lambda rows: json.dumps(rows).replace('"text": "12', '"text" "12').encode(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_not_read_to_its_end_fails_the_build_unless_it_may(
    project: Callable[..., Path], name: str
) -> None:
    manifest = project(sources=[{"name": "t", "type": "text", "path": name}], max_rejected=1)
    (manifest.parent / name).write_bytes(BROKEN[name]([{"text": f"{i} is {i * i}."} for i in range(40)]))
    with pytest.raises(ValueError, match=f"sources.0: 1 of its files .*damaged: keep.*:\n  {name}.*; the rest is not"):
        build(manifest)
    kept = build(manifest, ["damaged=keep"]).info.sources["t"]
    assert kept.kept and kept.reasons == {"rest not read": 1}


def test_what_a_split_leaves_out_does_not_make_bad_records_rare(project: Callable[..., Path]) -> None:
    split = {"heldout": 0.9, "take": "train"}
    manifest = project(sources=[{"name": "t", "type": "text", "path": "t.jsonl", "split": split}], max_rejected=0.2)
    (manifest.parent / "t.jsonl").write_text('{"text": "a"}\n' * 200 + "{\n" * 10)
    with pytest.raises(ValueError, match=r"sources.0: 10 of (1|2|3)?\d records are bad"):
        build(manifest)


def test_needles_and_books_share_a_split(project: Callable[..., Path]) -> None:
    sides = {}
    for take in ("train", "heldout"):
        split = {"heldout": 0.5, "take": take}
        needles = {"name": "n", "type": "needles", "count": 1, "haystack": "books/*.txt", "tokens": 300, "split": split}
        books = {"name": "b", "type": "books", "path": "books/*.txt", "split": split}
        source, other = read_dataset_manifest(project(take, sources=[needles, books])).sources
        files = find_files(other.path, "path")  # type: ignore[union-attr]
        (haystack,) = group_input(source, files)
        sides[take] = {file.key for file in haystack}
        assert sides[take] == {
            file.key for file in files if is_heldout(Split.model_validate(split), file.key) == (take == "heldout")
        }
    assert sides["train"] and sides["heldout"] and not sides["train"] & sides["heldout"]
