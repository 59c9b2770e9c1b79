"""The same chat in every format gives the same tokens, and what is no chat is told with its reason."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lwm_data.format.prompt import chat_runs
from lwm_data.format.vocab import TextTokenizer
from lwm_data.manifest_sources import Chats
from lwm_data.sources.chat_formats import Chat, NotAChat, parse_chat
from lwm_data.sources.chats import read_chats
from lwm_data.sources.files import InputFile
from lwm_data.sources.record import Record, Rejection

SAID = [("Hello!", "Good day."), ("Bye!", "Farewell.")]
WORDS = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


def _source(**keys: Any) -> Chats:
    return Chats.model_validate({"name": "c", "type": "chats", "path": "x"} | keys)


def _flat(said: Any) -> list[str]:
    return [words for turn in said for words in turn]


def _ultrachat(said: Any) -> dict[str, Any]:
    return {"data": _flat(said)}


def _sharegpt(said: Any) -> dict[str, Any]:
    roles = ["human", "gpt"] * len(said)
    return {"conversations": [{"from": r, "value": w} for r, w in zip(roles, _flat(said), strict=True)]}


def _openai(said: Any) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(said)
    return {"messages": [{"role": r, "content": w} for r, w in zip(roles, _flat(said), strict=True)]}


def _parts(said: Any) -> dict[str, Any]:
    """OpenAI's list of parts, the words cut in two."""
    chat = _openai(said)
    for message in chat["messages"]:
        words = message["content"]
        message["content"] = [
            {"type": "text", "text": half} for half in (words[: len(words) // 2], words[len(words) // 2 :])
        ]
    return chat


@given(said=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5))
def test_every_format_says_the_same(said: list[tuple[str, str]]) -> None:
    for form in (_ultrachat, _sharegpt, _openai, _parts):
        assert parse_chat(form(said)) == Chat(tuple(said))


def test_a_file_may_mix_formats_and_each_file_kind_gives_the_same(
    tmp_path: Path, demo_tokenizer: TextTokenizer
) -> None:
    rows = [_ultrachat(SAID) | {"id": "a"}, _sharegpt(SAID) | {"id": "b"}, _openai(SAID) | {"id": "c"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    array = json.dumps(rows).encode()
    files = {
        "c.jsonl": lines,
        "c.jsonl.gz": gzip.compress(lines),
        "c.jsonl.zst": zstandard.ZstdCompressor().compress(lines),
        "c.json": array,
        "c.json.gz": gzip.compress(array),
        "lines.json": lines,
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    pq.write_table(
        pa.Table.from_pylist(
            rows,
            pa.schema(
                [(name, pa.array([row[name]]).type) for row in rows for name in row if name != "id"]
                + [("id", pa.string())]
            ),
        ),
        tmp_path / "c.parquet",
    )
    wanted = chat_runs(demo_tokenizer, SAID)
    for name in [*files, "c.parquet"]:
        records = list(read_chats(_source(), InputFile(str(tmp_path / name), name), demo_tokenizer))
        assert [record.key for record in records] == ["a", "b", "c"], name
        for record in records:
            assert isinstance(record, Record) and record.note is None
            assert [run.tokens.tolist() for run in record.runs] == [run.tokens.tolist() for run in wanted]
            assert [run.trained for run in record.runs] == [run.trained for run in wanted]


def test_a_system_message_stands_in_place_of_the_usual_words(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    said = _openai(SAID)
    rows = [
        {"messages": [{"role": "system", "content": "Be brief."}, *said["messages"]]},
        _sharegpt(SAID) | {"system": "Be brief."},
        {"messages": [{"role": "system", "content": ""}, *said["messages"]]},
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = []
    for record in read_chats(_source(), InputFile(str(tmp_path / "c.jsonl"), "c.jsonl"), demo_tokenizer):
        assert isinstance(record, Record)
        assert [run.trained for run in record.runs[:3]] == [False, False, True]
        texts.append(demo_tokenizer.decode(record.runs[1].tokens))
    assert texts[:2] == ["Be brief. USER: Hello! ASSISTANT:"] * 2
    assert texts[2] == "You are a helpful assistant. USER: Hello! ASSISTANT:"


def _said(*turns: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": words} for role, words in turns]}


@pytest.mark.parametrize(
    ("turns", "kept", "told"),
    [
        ([("assistant", "x"), ("user", "a"), ("assistant", "b")], ("a", "b"), "the first turn"),
        ([("user", "a"), ("assistant", "b"), ("user", "x")], ("a", "b"), "the last turn"),
        ([("system", "s"), ("assistant", "x"), ("user", "a"), ("assistant", "b"), ("user", "y")], ("a", "b"), "and"),
    ],
)
def test_a_turn_that_has_no_partner_at_an_end_is_left_out_and_told(turns: Any, kept: Any, told: str) -> None:
    chat = parse_chat(_said(*turns))
    assert chat.turns == (kept,) and told in chat.left_out


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([], "not a chat"),
        ({"text": "a"}, "not a chat"),
        ({"data": ["a"]}, "not a chat"),
        ({"data": ["a", " "]}, "empty turn"),
        ({"data": ["a", 1]}, "not a chat"),
        ({"messages": []}, "not a chat"),
        ({"messages": ["a", "b"]}, "not a chat"),
        (_said(("user", "a")), "not a chat"),
        (_said(("assistant", "a")), "not a chat"),
        (_said(("user", "a"), ("user", "b"), ("assistant", "c")), "roles do not alternate"),
        (_said(("user", "a"), ("system", "b"), ("assistant", "c")), "roles do not alternate"),
        (_said(("system", "b"), ("user", "a"), ("assistant", "c")) | {"system": "d"}, "roles do not alternate"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
            "turn not to be trained",
        ),
        (_said(("user", "a"), ("assistant", None)), "empty turn"),
        (_said(("user", "a"), ("assistant", "")), "empty turn"),
        (_said(("user", "a"), ("assistant", [])), "empty turn"),
        (_said(("user", "a"), ("assistant", "b"), ("tool", "c")), "tool turn"),
        (_said(("user", "a"), ("narrator", "b")), "unknown role"),
        (_said(("user", "a"), (None, "b")), "unknown role"),
        (_said(("user", [{"type": "image_url", "image_url": "x"}]), ("assistant", "b")), "not text"),
        (_said(("user", "\ud800"), ("assistant", "b")), "not a chat"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [1]}]}, "tool turn"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "observation", "value": "b"}]}, "tool turn"),
    ],
)
def test_what_is_no_chat_is_told(row: Any, reason: str) -> None:
    with pytest.raises(NotAChat) as error:
        parse_chat(row)
    assert error.value.args[0] == reason
    error.value.args[1].encode()


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "system", "gpt"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["data", "messages", "conversations", "role", "from", "value", "content", "system", "text", "type"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(rows=st.lists(JSON, max_size=8))
def test_any_json_is_a_chat_or_a_rejection(
    tmp_path_factory: pytest.TempPathFactory, demo_tokenizer: TextTokenizer, rows: list[Any]
) -> None:
    path = tmp_path_factory.mktemp("chats") / "c.json"
    path.write_text(json.dumps(rows))
    found = list(read_chats(_source(), InputFile(str(path), "c.json"), demo_tokenizer))
    assert len(found) == len(rows)
    for record in found:
        if isinstance(record, Record):
            assert any(run.trained for run in record.runs)
        else:
            assert isinstance(record, Rejection) and record.detail
