"""The real build, in process: what lies in the folder, what a second build does, and what makes it start anew."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from lwm_data.build import build
from lwm_data.check import check_dataset
from lwm_data.cli import app
from lwm_data.format.dataset import open_dataset
from lwm_data.format.vocab import TextTokenizer
from lwm_data.terminal import run_app


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_build_keeps_every_token_of_its_input(project: Callable[..., Path]) -> None:
    manifest = project()
    result = build(manifest)
    dataset = open_dataset(result.out)
    assert check_dataset(dataset, lambda rows: None) == []
    assert len(result.info.shards) > 3 and result.info.num_rows == len(dataset)
    tokenizer = dataset.text_tokenizer
    texts: dict[str, dict[int, str]] = {}
    first_row = 0
    for shard in result.info.shards:
        for line in pq.read_table(result.out / shard.name.replace(".tar", ".examples.parquet")).to_pylist():
            if line["source"] == "books":
                arrays = dataset[first_row + line["row"]]
                ids = arrays["tokens"][arrays["segment_ids"] == line["segment"]]
                assert ids[0] == tokenizer.bos
                texts.setdefault(line["key"], {})[line["part"]] = ids[1:]
        first_row += shard.num_rows
    assert sorted(texts) == [f"book{i}.txt" for i in range(4)]
    for key, parts in texts.items():
        ids = np.concatenate([parts[part] for part in range(len(parts))])
        assert ids[-1] == tokenizer.eos
        assert tokenizer.decode(ids[:-1]) == (manifest.parent / "books" / key).read_text(encoding="utf-8")
    counts = result.info.sources
    assert (counts["books"].records, counts["chats"].examples, counts["needles"].examples) == (4, 30, 40)
    assert result.info.num_tokens == sum(source.tokens for source in counts.values())


def test_the_folder_holds_what_format_py_names_and_nothing_else(project: Callable[..., Path]) -> None:
    result = build(project())
    shards = [shard.name for shard in result.info.shards]
    tables = [name.replace(".tar", ".examples.parquet") for name in shards]
    others = ["README.md", "index.json", "rejected.jsonl", "text_tokenizer.model", "text_tokenizer.yaml"]
    assert sorted(_bytes(result.out)) == sorted([*shards, *tables, *others])
    assert not [path for path in (result.out.parent / "token-store").iterdir() if path.suffix != ".arrow"]


def test_two_workers_write_the_bytes_of_one(project: Callable[..., Path]) -> None:
    one = build(project("one"), workers=1)
    two = build(project("two"), workers=2)
    assert _bytes(one.out) == _bytes(two.out)
    assert _bytes(one.out.parent / "token-store") == _bytes(two.out.parent / "token-store")


def test_a_second_build_has_nothing_to_do(project: Callable[..., Path]) -> None:
    manifest = project()
    first = build(manifest)
    before = _times(first.out)
    second = build(manifest)
    assert (first.built, second.built) == (True, False)
    assert second.info == first.info and _times(first.out) == before


@pytest.mark.parametrize("change", ["row_length=300", "seed=1", "packing=naive", "loss_weighting=token", "name=other"])
def test_a_changed_manifest_gives_the_bytes_of_a_build_from_nothing(project: Callable[..., Path], change: str) -> None:
    build(project("one"))
    store = _times(project("one").parent / "token-store")
    changed = build(project("one"), [change])
    fresh = build(project("two"), [change])
    assert changed.built and _bytes(changed.out) == _bytes(fresh.out)
    kept = {name: time for name, time in _times(changed.out.parent / "token-store").items() if name in store}
    assert kept == store, "what is tokenized stays"
    reused = {"row_length=300", "packing=naive", "loss_weighting=token", "name=other"}
    if change in reused:
        assert set(_times(changed.out.parent / "token-store")) == set(store)


def test_a_changed_input_is_built_again(project: Callable[..., Path]) -> None:
    manifest = project()
    before = build(manifest)
    book = manifest.parent / "books" / "book1.txt"
    book.write_text(book.read_text().replace("Alice", "Alicia"))
    after = build(manifest)
    assert after.built and after.info.fingerprint != before.info.fingerprint
    assert check_dataset(open_dataset(after.out), lambda rows: None) == []


def test_a_smaller_build_leaves_no_shard_of_the_larger(project: Callable[..., Path]) -> None:
    manifest = project()
    large = build(manifest)
    small = build(manifest, ["shard_size=1MB"])
    assert len(large.info.shards) > len(small.info.shards) == 1
    assert sorted(path.name for path in small.out.glob("shard-*")) == [
        "shard-000000.examples.parquet",
        "shard-000000.tar",
    ]


def test_a_damaged_dataset_is_mended_by_building_again(project: Callable[..., Path]) -> None:
    manifest = project()
    result = build(manifest)
    whole = _bytes(result.out)
    shard = result.out / result.info.shards[1].name
    shard.write_bytes(shard.read_bytes()[:100])
    assert build(manifest).built and _bytes(result.out) == whole


def test_naive_rows_are_full_and_one_segment(project: Callable[..., Path]) -> None:
    result = build(project(), ["packing=naive"])
    dataset = open_dataset(result.out)
    assert check_dataset(dataset, lambda rows: None) == []
    assert dataset.info.num_rows == -(-dataset.info.num_tokens // 256)
    assert all((dataset[row]["segment_ids"] == 1).all() for row in range(len(dataset) - 1))


def test_what_is_not_taken_is_counted_with_its_reason(
    project: Callable[..., Path], demo_tokenizer: TextTokenizer
) -> None:
    books = (project().parent / "books").glob("*.txt")
    middle = sorted(len(demo_tokenizer.encode(book.read_text())) for book in books)[2]  # of four
    manifest = project(
        sources=[
            {"name": "some", "type": "books", "path": "books/*.txt", "tokens": {"min": middle}, "overflow": "truncate"},
            {"name": "all", "type": "books", "path": "books/*.txt", "tokens": {"max": middle}, "overflow": "drop"},
            {"name": "chats", "type": "chats", "path": "chats.jsonl"},
        ],
        max_rejected=0.1,
    )
    with open(manifest.parent / "chats.jsonl", "a") as file:
        file.write('{"id": "odd", "data": ["alone"]}\n')
    result = build(manifest)
    lines = [json.loads(line) for line in (result.out / "rejected.jsonl").read_text().splitlines()]
    counted: dict[str, int] = {}
    for line in lines:
        counted[line["reason"]] = counted.get(line["reason"], 0) + 1
    assert result.info.rejected == counted
    assert set(counted) == {"too short", "too long", "truncated", "longer than a row", "not a chat"}
    some, every = result.info.sources["some"], result.info.sources["all"]
    assert some.records == every.records == 4 and every.rejected == 4 and every.examples == 0
    assert some.examples == 4 - some.rejected == counted["truncated"] and some.tokens == 256 * some.examples
    (odd,) = [line for line in lines if line["reason"] == "not a chat"]
    assert odd == {
        "source": "chats",
        "key": "chats.jsonl:31",
        "reason": "not a chat",
        "detail": "data: 1 turns; wanted pairs of user and assistant",
    }


def test_a_folder_of_someone_else_s_is_refused_and_left_alone(project: Callable[..., Path]) -> None:
    manifest = project()
    (manifest.parent / "out").mkdir()
    (manifest.parent / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out: got .*: not empty and no dataset"):
        build(manifest)
    assert _bytes(manifest.parent / "out") == {"thesis.txt": b"mine"}


def test_two_builds_never_write_to_one_folder(project: Callable[..., Path]) -> None:
    manifest = project()
    lock = manifest.parent / "out" / ".work" / "lock"
    lock.parent.mkdir(parents=True)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another build is writing there"):
            build(manifest)
    assert build(manifest).built


def test_the_command_line_builds_checks_and_shows(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = project()

    def run(*args: str) -> str:
        assert run_app(app, list(args)) == 0
        return capsys.readouterr().out

    out = str(manifest.parent / "out")
    table = run("build", str(manifest))
    assert "books" in table and "needles" in table and table.rstrip().endswith(min(out, os.path.relpath(out), key=len))
    assert "nothing to do" in run("build", str(manifest))
    described: Any = json.loads(run("build", str(manifest), "--json"))
    assert described["built"] is False and 0.8 < described["fill"] <= 1
    assert json.loads(run("check", out, "--json")) == {"rows": described["num_rows"], "problems": []}
    assert "no problem found" in run("check", out)
    assert json.loads(run("show", out, "--json"))["num_rows"] == described["num_rows"]
    for row in range(described["num_rows"]):
        view: Any = json.loads(run("show", out, str(row), "--json"))
        tokens = sum(run["num_tokens"] for segment in view["segments"] for run in segment["runs"])
        assert tokens + view["padding"] == 256
        assert tokens == sum(segment["num_tokens"] for segment in view["segments"])
        chats = [segment for segment in view["segments"] if segment["source"] == "chats"]
        for chat in chats:
            trained = "".join(run["text"] for run in chat["runs"] if run["weight"])
            number = int(chat["key"].removeprefix("chat-"))
            assert trained == f" It is {2 * number}.</s> Not at all.</s>"
            assert chat["runs"][0]["text"].startswith("<s>") and not chat["runs"][0]["weight"]
    assert "segment 1" in run("show", out, "0") and "padding: " in run("show", out, "0")
    assert "properties" in json.loads(run("schema", "dataset"))


@pytest.mark.parametrize("verb", [["build"], ["check"], ["show"], ["schema"], ["tokenizer", "train-text"]])
def test_every_verb_s_help_teaches_by_an_example(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app, [*verb, "--help"]) == 0
    assert f"lwm-data {' '.join(verb)}" in capsys.readouterr().out.split("Example:")[1]
