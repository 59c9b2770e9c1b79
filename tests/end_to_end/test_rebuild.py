"""A build into a folder that holds something: what is good stays until better stands, a stranger's files stay."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lwm_data.build import build
from lwm_data.check import check_dataset
from lwm_data.format.dataset import open_dataset
from lwm_data.format.vocab import TextTokenizer, load_text_tokenizer


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_rebuild_that_refuses_its_input_leaves_the_dataset_as_it_is(project: Callable[..., Path]) -> None:
    manifest = project()
    out = build(manifest).out
    before = _bytes(out)
    with pytest.raises(ValueError, match="do not fit a row"):
        build(manifest, ["sources.0.overflow=error"])
    assert _bytes(out) == before
    assert not build(manifest).built


def test_what_a_refused_rebuild_rejected_can_be_read_until_the_next(project: Callable[..., Path]) -> None:
    manifest = project()
    out = build(manifest).out
    before = _bytes(out)
    with open(manifest.parent / "chats.jsonl", "a", encoding="utf-8") as file:
        file.write('{"id": "odd", "data": ["alone"]}\n' * 9)
    with pytest.raises(ValueError, match=r"records are bad") as error:
        build(manifest)
    named = Path(str(error.value).rsplit(", in ", 1)[1])
    assert sum(json.loads(line)["source"] == "chats" for line in named.read_text().splitlines()) == 9
    after = _bytes(out)
    assert {name: after[name] for name in before} == before
    assert build(manifest, ["max_rejected=0.5"]).built
    fresh = build(manifest, ["max_rejected=0.5", "out=fresh"]).out
    assert _bytes(out) == _bytes(fresh), "and nothing is left of the refused one"


@pytest.mark.parametrize("index", [b'{"wids_version": 1}', b"[]", b"no JSON", b"\xff"])
def test_a_folder_with_an_index_of_someone_else_s_is_refused_and_left_alone(
    project: Callable[..., Path], index: bytes
) -> None:
    manifest = project()
    out = manifest.parent / "out"
    out.mkdir()
    theirs = {"README.md": b"mine", "index.json": index, "shard-000900.tar": b"mine"}
    for name, content in theirs.items():
        (out / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"out: got .*: not empty and no dataset"):
        build(manifest)
    assert _bytes(out) == theirs


def test_a_build_removes_no_file_that_is_not_called_as_it_calls_them(project: Callable[..., Path]) -> None:
    manifest = project()
    out = build(manifest).out
    theirs = {"shard-old.tar": b"mine", "shard-7.tar": b"mine", "shard-000000.tar.bak": b"mine"}
    for name, content in theirs.items():
        (out / name).write_bytes(content)
    (out / "shard-000900.tar").write_bytes(b"of a build")
    assert build(manifest, ["seed=1"]).built
    got = _bytes(out)
    assert {name: got[name] for name in theirs} == theirs and "shard-000900.tar" not in got


def test_a_build_killed_before_it_had_its_lock_can_go_on(project: Callable[..., Path]) -> None:
    manifest = project()
    (manifest.parent / "out" / ".work").mkdir(parents=True)
    assert build(manifest).built


@pytest.mark.parametrize("name", ["shard-000001.examples.parquet", "text_tokenizer.model", "text_tokenizer.yaml"])
def test_a_small_file_with_a_byte_changed_is_mended_by_building_again(project: Callable[..., Path], name: str) -> None:
    manifest = project()
    out = build(manifest).out
    whole = _bytes(out)
    damaged = bytearray(whole[name])
    damaged[len(damaged) // 2] ^= 1
    (out / name).write_bytes(damaged)
    assert check_dataset(open_dataset(out), lambda rows: None)
    assert build(manifest).built and _bytes(out) == whole


def test_a_shard_with_a_byte_changed_is_mended_as_check_says(project: Callable[..., Path]) -> None:
    manifest = project()
    out = build(manifest).out
    whole = _bytes(out)
    damaged = bytearray(whole["shard-000001.tar"])
    damaged[1000] ^= 1
    (out / "shard-000001.tar").write_bytes(damaged)
    problems = check_dataset(open_dataset(out), lambda rows: None)
    assert any(p.startswith("shard-000001.tar: sha256") and "remove it and build again" in p for p in problems)
    (out / "shard-000001.tar").unlink()
    assert build(manifest).built and _bytes(out) == whole


def test_a_saved_tokenizer_replaces_another_whole(demo_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    """Who has the old file open, here by a second name, keeps it: at no moment is the file half of each."""
    names = ("text_tokenizer.model", "text_tokenizer.yaml")
    for name in names:
        (tmp_path / name).write_bytes(b"old")
        os.link(tmp_path / name, tmp_path / f"{name}.before")
    demo_tokenizer.save(tmp_path)
    assert [(tmp_path / f"{name}.before").read_bytes() for name in names] == [b"old", b"old"]
    assert load_text_tokenizer(tmp_path / names[1]).fingerprint == demo_tokenizer.fingerprint
    assert len(list(tmp_path.iterdir())) == 4
