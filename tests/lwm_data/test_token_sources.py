"""Tokens that somebody made before are documents with BOS and EOS, wherever they were cut and whatever they lack."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lwm_data.format.vocab import TextTokenizer
from lwm_data.manifest_sources import Tokens
from lwm_data.sources import tokens
from lwm_data.sources.files import InputFile
from lwm_data.sources.record import UNREAD, Record, Rejection
from lwm_data.sources.tokens import read_tokens

BOS, EOS = 1, 2
BODY = st.lists(st.integers(3, 900), min_size=1, max_size=20)


def _source(**keys: Any) -> Tokens:
    return Tokens.model_validate({"name": "t", "type": "tokens", "path": "x"} | keys)


def _ids(record: Record | Rejection) -> list[int]:
    assert isinstance(record, Record), record
    return [int(token) for run in record.runs for token in run.tokens]


def _trained(record: Record | Rejection) -> list[bool]:
    assert isinstance(record, Record), record
    return [run.trained for run in record.runs for _ in run.tokens]


def _npy(ids: Any, dtype: Any = np.uint16) -> bytes:
    raw = io.BytesIO()
    np.save(raw, np.array(ids, dtype))
    return raw.getvalue()


def _read(folder: Path, name: str, data: bytes, tokenizer: TextTokenizer, **keys: Any) -> list[Record | Rejection]:
    (folder / name).write_bytes(data)
    return list(read_tokens(_source(**keys), InputFile(str(folder / name), name), tokenizer))


@given(
    documents=st.lists(st.tuples(BODY, st.sampled_from(["both", "bos", "eos"])), min_size=1, max_size=12),
    dtype=st.sampled_from(["<u2", ">u4", "<i4"]),
    block=st.integers(1, 40),
)
def test_a_stream_is_cut_at_bos_and_eos_wherever_a_block_ends(
    tmp_path_factory: pytest.TempPathFactory, demo_tokenizer: TextTokenizer, documents: Any, dtype: str, block: int
) -> None:
    stream: list[int] = []
    wanted: dict[str, list[int]] = {}
    ended = True
    for body, has in documents:
        begins = has != "eos" or not ended  # a document without BOS can only follow an EOS
        wanted[f"a.npy:{len(stream)}"] = [BOS, *body, EOS]
        stream += [BOS] * begins + body + [EOS] * (has != "bos")
        ended = has != "bos"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "BLOCK", block)
        records = _read(tmp_path_factory.mktemp("npy"), "a.npy", _npy(stream, dtype), demo_tokenizer)
    assert {record.key: _ids(record) for record in records} == wanted
    assert all(_trained(record) == [False] + [True] * (len(_ids(record)) - 1) for record in records)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.ZstdCompressor().compress], ids=["", "gz", "zst"])
def test_a_broken_stream_is_told_after_the_documents_before(
    tmp_path: Path, demo_tokenizer: TextTokenizer, pack: Any
) -> None:
    ending = {bytes: "", gzip.compress: ".gz"}.get(pack, ".zst")
    name = f"a.npy{ending}"
    whole = _npy([5, 6, EOS, EOS, 60_000, EOS, 7])
    records = _read(tmp_path, name, pack(whole), demo_tokenizer)
    assert [of.reason if isinstance(of, Rejection) else _ids(of) for of in records] == [
        [BOS, 5, 6, EOS],
        "unknown id",
        [BOS, 7, EOS],
    ]
    cut = _read(tmp_path, name, pack(whole[:-3]), demo_tokenizer)
    assert isinstance(cut[-1], Rejection) and cut[-1].reason == UNREAD and _ids(cut[0]) == [BOS, 5, 6, EOS]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "rest not read"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': evil()}", "rest not read"),
        (b"\x93NUMPY\x01", "rest not read"),
        (b"no array at all", "rest not read"),
        (_npy([[1, 2], [3, 4]]), "rest not read"),
        (_npy([1.5, 2.5], np.float32), "rest not read"),
        (_npy([-1, 5], np.int32), "unknown id"),
    ],
)
def test_what_is_no_stream_of_ids_is_told(
    tmp_path: Path, demo_tokenizer: TextTokenizer, data: bytes, reason: str
) -> None:
    (told,) = _read(tmp_path, "a.npy", data, demo_tokenizer)
    assert isinstance(told, Rejection) and told.reason == reason


def test_an_array_of_objects_is_never_unpickled(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    raw = io.BytesIO()
    np.save(raw, np.array([{"a": 1}], object), allow_pickle=True)
    (told,) = _read(tmp_path, "a.npy", raw.getvalue(), demo_tokenizer)
    assert isinstance(told, Rejection) and told.reason == "rest not read"


def test_a_document_above_the_limit_is_counted_and_not_held(
    tmp_path: Path, demo_tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "MAX_TOKENS", 100)
    monkeypatch.setattr(tokens, "BLOCK", 30)
    found = _read(tmp_path, "a.npy", _npy([5, EOS, *[6] * 5000, EOS, 7, EOS]), demo_tokenizer)
    assert [of.reason if isinstance(of, Rejection) else of.key for of in found] == [
        "a.npy:0",
        "too large",
        "a.npy:5003",
    ]


@given(
    body=BODY,
    mask=st.lists(st.booleans(), min_size=20, max_size=20),
    has_bos=st.booleans(),
    has_eos=st.booleans(),
)
def test_a_label_trains_the_token_that_it_stands_at(
    tmp_path_factory: pytest.TempPathFactory,
    demo_tokenizer: TextTokenizer,
    body: list[int],
    mask: list[bool],
    has_bos: bool,
    has_eos: bool,
) -> None:
    ids = [BOS] * has_bos + body + [EOS] * has_eos
    marks = (mask * 2)[: len(ids)]
    labels = [of if mark else -100 for of, mark in zip(ids, marks, strict=True)]
    row = {"input_ids": ids, "labels": labels, "mask": [int(mark) for mark in marks]}
    folder = tmp_path_factory.mktemp("rows")
    pq.write_table(pa.Table.from_pylist([row]), folder / "a.parquet")
    (folder / "a.jsonl").write_text(json.dumps(row))
    trained = [False] + marks[has_bos:] + [] * has_eos + ([] if has_eos else [marks[-1]])
    for name, keys in (("a.parquet", {"labels": "labels"}), ("a.jsonl", {"trained": "mask"})):
        (record,) = read_tokens(_source(**keys), InputFile(str(folder / name), name), demo_tokenizer)
        if any(trained):
            assert _ids(record) == [BOS, *body, EOS] and _trained(record) == trained
        else:
            assert isinstance(record, Rejection) and record.reason == "nothing trained"


def test_ids_of_a_text_give_the_rows_of_the_text(
    tmp_path: Path, demo_tokenizer: TextTokenizer, corpus_text: str
) -> None:
    ids = demo_tokenizer.encode(corpus_text[:5000]).tolist()
    table = pa.table({"id": ["x"], "input_ids": pa.array([ids], pa.list_(pa.int32()))})
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        (record,) = read_tokens(_source(), InputFile(str(tmp_path / name), name), demo_tokenizer)
        assert record.key == "x" and _ids(record) == [BOS, *ids, EOS]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"ids": [5]}, "missing field"),
        ({"input_ids": "5 6"}, "wrong field"),
        ({"input_ids": [5, [6]]}, "wrong field"),
        ({"input_ids": [5.0]}, "wrong field"),
        ({"input_ids": [1 << 70]}, "unknown id"),
        ({"input_ids": [5, -1]}, "unknown id"),
        ({"input_ids": []}, "empty"),
        ({"input_ids": [BOS, EOS]}, "empty"),
        ({"input_ids": [5, 6], "labels": [5]}, "wrong field"),
        ({"input_ids": [5, 6], "labels": [-100, 7]}, "labels differ"),
        ({"input_ids": [5, 6], "labels": [-100, -100]}, "nothing trained"),
        ([5, 6], "not an object"),
    ],
)
def test_a_row_that_is_no_record_is_told_and_the_next_kept(
    tmp_path: Path, demo_tokenizer: TextTokenizer, row: Any, reason: str
) -> None:
    lines = f"{json.dumps(row)}\n{json.dumps({'input_ids': [5], 'labels': [5]})}\n"
    keys = {"labels": "labels"} if isinstance(row, dict) and "labels" in row else {}
    told, kept = _read(tmp_path, "a.jsonl", lines.encode(), demo_tokenizer, **keys)
    assert isinstance(told, Rejection) and (told.key, told.reason) == ("a.jsonl:1", reason)
    assert _ids(kept) == [BOS, 5, EOS]


def test_columns_of_other_types_and_nulls_are_told(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    for column in (pa.array([["a"]]), pa.array([[5, None]]), pa.array([None], pa.list_(pa.int32())), pa.array([5])):
        pq.write_table(pa.table({"input_ids": column}), tmp_path / "a.parquet")
        (told,) = read_tokens(_source(), InputFile(str(tmp_path / "a.parquet"), "a.parquet"), demo_tokenizer)
        assert isinstance(told, Rejection) and told.reason in ("wrong field", "missing field"), column


def test_a_stream_with_a_mask_is_the_user_s_error(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match=r"a\.npy: got a stream of tokens; trained and labels are for rows"):
        _read(tmp_path, "a.npy", _npy([5]), demo_tokenizer, labels="labels")


def test_separators_that_stand_twice_are_no_documents(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    stream = [EOS, BOS, EOS, BOS, 5, 6, EOS, EOS, BOS, 7, EOS, EOS]
    records = _read(tmp_path, "a.npy", _npy(stream), demo_tokenizer)
    assert {record.key: _ids(record) for record in records} == {"a.npy:3": [BOS, 5, 6, EOS], "a.npy:8": [BOS, 7, EOS]}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_what_the_attention_mask_calls_padding_is_no_token(
    tmp_path: Path, demo_tokenizer: TextTokenizer, kind: str
) -> None:
    rows: list[dict[str, Any]] = [
        {"input_ids": [5, 6, 7, 0, 0], "attention_mask": [1, 1, 1, 0, 0], "labels": [-100, 6, 7, -100, -100]},
        {"input_ids": [EOS, EOS, BOS, 8, EOS], "attention_mask": [0, 0, 1, 1, 1], "labels": [-100, -100, 1, 8, 2]},
        {"input_ids": [5, 6, 7], "attention_mask": None, "labels": [5, 6, 7]},
        {"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1], "labels": [5, 6, 7]},
        {"input_ids": [5, 6, 7], "attention_mask": [0, 0, 0], "labels": [5, 6, 7]},
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1], "labels": [5, 6, 7]},
        {"input_ids": [5, 6, 7], "attention_mask": [1, 2, 1], "labels": [5, 6, 7]},
    ]
    raw = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), raw)
    data = raw.getvalue() if kind == "parquet" else "".join(json.dumps(row) + "\n" for row in rows).encode()
    plain = _read(tmp_path, f"a.{kind}", data, demo_tokenizer)
    assert [_ids(record) for record in plain[:3]] == [[BOS, 5, 6, 7, EOS], [BOS, 8, EOS], [BOS, 5, 6, 7, EOS]]
    told = [(of.reason, of.detail) for of in plain[3:] if isinstance(of, Rejection)]
    assert [reason for reason, _ in told] == ["wrong field", "empty", "wrong field", "wrong field"]
    assert told[0][1] == "attention_mask.1: got 0 between ids; wanted it at the ends alone"
    labelled = _read(tmp_path, f"a.{kind}", data, demo_tokenizer, labels="labels")
    assert [_trained(record) for record in labelled[:2]] == [[False, False, True, True, True], [False, True, True]]
