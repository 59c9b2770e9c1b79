"""Builds that leave out duplicates and evaluation texts: real novels, several sources, workers and kills."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lwm_data.build import build
from lwm_data.format.dataset import DatasetInfo

DEMO = Path(__file__).parents[2] / "manifests" / "demo"
Project = Callable[..., Path]
NOVELS = {"name": "novels", "type": "books", "path": "novels/*.txt"}
COPIES = {"name": "copies", "type": "books", "path": "copies/*.txt"}


def rejected(info_of: Path) -> dict[tuple[str, str], tuple[str, str]]:
    lines = [json.loads(line) for line in (info_of / "rejected.jsonl").read_text().splitlines()]
    return {(line["source"], line["key"]): (line["reason"], line["detail"]) for line in lines}


def write(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def novels(project: Project, copies: dict[str, str], **keys: Any) -> tuple[DatasetInfo, Path]:
    """Builds the shortest novels of the demo and `copies`, of which the second source is made."""
    manifest = project(sources=[NOVELS, COPIES], row_length=2048, shard_size="16MB", **keys)
    folder = manifest.parent
    (folder / "novels").mkdir(exist_ok=True)
    for name in ("alice_in_wonderland", "call_of_the_wild"):
        shutil.copy(DEMO / "novels" / f"{name}.txt", folder / "novels")
    write(folder, {f"copies/{name}": text for name, text in copies.items()})
    return build(manifest).info, folder / "out"


@pytest.fixture(scope="module")
def alice() -> str:
    return (DEMO / "novels" / "alice_in_wonderland.txt").read_text(encoding="utf-8")


def test_copies_of_real_novels_go_and_what_is_new_stays(project: Project, alice: str) -> None:
    """A word changed here and there, another header, other line breaks; and a book with one chapter of another."""
    other = (DEMO / "heldout" / "time_machine.txt").read_text(encoding="utf-8")
    rng = random.Random(0)
    words = alice.split(" ")
    header = (
        "The Project Gutenberg eBook of Alice's Adventures in Wonderland\n\nThis eBook is for the use of anyone.\n\n"
    )
    chapter = alice[20_000:32_000]
    copies = {
        "a_exact.txt": alice,
        "b_header.txt": header + alice,
        "c_lines.txt": "\n".join(alice.split()),
        "d_3_percent.txt": " ".join("x" if rng.random() < 0.03 else word for word in words),
        "e_chapter_pasted.txt": other[:60_000] + chapter + other[60_000:],
        "f_chapter_alone.txt": chapter,
        "g_new.txt": other,
    }
    info, out = novels(project, copies, duplicates={"exact": True, "near": 0.7})
    found = rejected(out)
    assert {key: reason for (_, key), (reason, _) in found.items()} == {
        "a_exact.txt": "duplicate",
        "b_header.txt": "near duplicate",
        "c_lines.txt": "duplicate",
        "d_3_percent.txt": "near duplicate",
        "g_new.txt": "near duplicate",
    }
    assert found["copies", "a_exact.txt"][1] == "the same text as novels alice_in_wonderland.txt, which is kept"
    assert "like novels alice_in_wonderland.txt, which is kept: about 0." in found["copies", "d_3_percent.txt"][1]
    assert "like copies e_chapter_pasted.txt" in found["copies", "g_new.txt"][1]
    assert info.rejected["duplicate"] == 2 and info.rejected["near duplicate"] == 3
    assert info.sources["copies"].records == 7 and info.sources["copies"].rejected == 5


def test_a_pasted_chapter_of_an_evaluation_book_is_found(project: Project, alice: str) -> None:
    heldout = (DEMO / "heldout" / "wizard_of_oz.txt").read_text(encoding="utf-8")
    copies = {"chapter.txt": alice[:30_000] + heldout[50_000:56_000] + alice[30_000:], "clean.txt": alice[::-1]}
    rule = {"texts": [str(DEMO / "heldout" / "*.txt")]}
    info, out = novels(project, copies, contamination=rule)
    found = rejected(out)
    assert set(found) == {("copies", "chapter.txt")}, "no other novel shares 13 words with one that is held out"
    reason, detail = found["copies", "chapter.txt"]
    assert reason == "contaminated" and "of its n-grams are of wizard_of_oz.txt; first: " in detail
    ngram = detail.partition("first: ")[2].split()
    assert len(ngram) == 13 and ngram[0] in heldout[50_000:51_000].lower()
    assert info.rejected["contaminated"] == 1


def test_the_demo_trains_on_no_text_that_it_is_evaluated_with(project: Project) -> None:
    manifest = project(
        sources=[NOVELS | {"path": str(DEMO / "novels" / "*.txt")}],
        contamination={"texts": [str(DEMO / "heldout" / "*.txt")]},
        row_length=2048,
        shard_size="16MB",
    )
    assert build(manifest).info.rejected.get("contaminated", 0) == 0


def everywhere(project: Project, name: str, **keys: Any) -> Path:
    """Books twice, chats twice, one of them with evaluation text."""
    sources = [
        {"name": "books", "type": "books", "path": "books/*.txt"},
        {"name": "again", "type": "books", "path": "again/*.txt"},
        {"name": "chats", "type": "chats", "path": "chats*.jsonl"},
        {"name": "needles", "type": "needles", "count": 20, "haystack": "books/*.txt", "tokens": 250},
    ]
    rule: dict[str, Any] = {"duplicates": {"near": 0.8}, "contamination": {"texts": ["eval.jsonl"], "words": 8}}
    rule["shard_size"] = "64KB"
    manifest = project(name, sources=sources, **(rule | keys))
    folder = manifest.parent
    book = (folder / "books" / "book1.txt").read_text(encoding="utf-8")
    write(folder, {"again/changed.txt": book.replace("Alice", "Alyce", 3), "again/same.txt": book})
    rows = [
        {"id": f"other-{i}", "data": [f"Why is {i} a number I like so much?", f"I do not know {i}."]} for i in range(9)
    ]
    rows.append({"id": "leak", "data": ["Which city has the tower that leans to one side?", "Pisa."]})
    rows.append({"id": "same", "data": rows[3]["data"]})
    write(folder, {"chats-2.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    (folder / "eval.jsonl").write_text(json.dumps({"question": "Which city has the tower that leans to one side?"}))
    return manifest


def test_duplicates_and_evaluation_texts_are_looked_for_in_all_sources(project: Project) -> None:
    manifest = everywhere(project, "all", max_rejected=0)
    info = build(manifest).info
    found = rejected(manifest.parent / "out")
    assert found["again", "same.txt"] == ("duplicate", "the same text as books book1.txt, which is kept")
    assert found["again", "changed.txt"][0] == "near duplicate"
    assert found["chats", "leak"][0] == "contaminated"
    assert found["chats", "leak"][1].startswith("3 of its n-grams are of eval.jsonl:1 question; first: which city has")
    assert found["chats", "same"] == ("duplicate", "the same text as chats other-3, which is kept")
    assert info.sources["needles"].rejected == 0, "needles share their haystack: they are not compared"
    assert sum(info.rejected[reason] for reason in ("duplicate", "near duplicate", "contaminated")) == len(found)


def test_haystacks_and_books_of_evaluation_text_are_left_out_of_needles_and_qa(project: Project) -> None:
    sources = [
        {"name": "needles", "type": "needles", "count": 5, "haystack": "books/book0.txt", "tokens": 400},
        {"name": "other", "type": "needles", "count": 5, "haystack": "books/book1.txt", "tokens": 400},
        {"name": "qa", "type": "qa", "path": "qa.jsonl", "books": "books/*.txt", "tokens": 500, "max_trained": 1},
    ]
    manifest = project(sources=sources, contamination={"texts": ["books/book0.txt"]}, row_length=512, max_rejected=0)
    pairs = []
    for book in ("book0.txt", "book1.txt"):
        text = (manifest.parent / "books" / book).read_text(encoding="utf-8")
        pair = {"id": book, "question": "Who?", "answer": "Alice.", "book": book, "chunk": 0, "chars": [0, 600]}
        digests = {"book_sha256": hashlib.sha256(text.encode()), "chunk_sha256": hashlib.sha256(text[:600].encode())}
        pairs.append(pair | {key: digest.hexdigest() for key, digest in digests.items()})
    write(manifest.parent, {"qa.jsonl": "".join(json.dumps(pair) + "\n" for pair in pairs)})
    info = build(manifest).info
    found = {key: reason for key, (reason, _) in rejected(manifest.parent / "out").items() if reason == "contaminated"}
    assert {name for name, _ in found} == {"needles", "qa"} and len(found) == 5 + 1
    assert next(key for name, key in found if name == "qa").startswith("book0.txt:")
    assert info.sources["other"].rejected == 0


def test_a_cleaned_source_is_searched_for_what_its_cleaning_makes_of_evaluation_texts(project: Project) -> None:
    text = "The \ufb01rst o\ufb03cer found a \ufb02ag in the \ufb01eld behind his house."
    sources = [
        {"name": "cleaned", "type": "text", "path": "texts/*.txt", "clean": {"unicode": "nfkc"}, "deduplicate": False},
        {"name": "raw", "type": "text", "path": "texts/*.txt", "deduplicate": False},
    ]
    manifest = project(sources=sources, contamination={"texts": ["eval/*.txt"], "words": 8})
    write(manifest.parent, {"eval/a.txt": text, "texts/a.txt": f"It is told: {text}", "texts/b.txt": "Another text."})
    build(manifest)
    assert {key for key in rejected(manifest.parent / "out")} == {("cleaned", "a.txt"), ("raw", "a.txt")}


def test_workers_change_no_byte_and_a_second_build_marks_nothing(project: Project) -> None:
    datasets = []
    for name, workers in (("one", 1), ("two", 2)):
        manifest = everywhere(project, name)
        build(manifest, workers=workers)
        datasets.append(
            {path.name: path.read_bytes() for path in (manifest.parent / "out").iterdir() if path.is_file()}
        )
    assert datasets[0] == datasets[1]
    marks = sorted((manifest.parent / "token-store").glob("marks-*"))
    stamps = [path.stat().st_mtime_ns for path in marks]
    assert len(marks) == 9
    build(manifest, ["duplicates.near=0.5", "duplicates.exact=false"])
    assert [path.stat().st_mtime_ns for path in marks] == stamps, "another threshold needs no other marks"
    assert sorted((manifest.parent / "token-store").glob("marks-*")) == marks
    (manifest.parent / "eval.jsonl").write_text(json.dumps({"question": "A question that no chat in here has asked."}))
    assert "contaminated" not in build(manifest).info.rejected


def test_a_record_that_is_too_long_is_no_reason_to_leave_out_its_copy(project: Project) -> None:
    manifest = everywhere(project, "lengths", contamination=None)
    raw = json.loads(manifest.read_text())
    raw["sources"] = [raw["sources"][0] | {"tokens": {"min": 10**6}}, raw["sources"][1]]
    manifest.write_text(json.dumps(raw))
    build(manifest)
    found = rejected(manifest.parent / "out")
    reason, detail = found["again", "same.txt"]
    assert reason == "near duplicate" and detail.startswith("like again changed.txt, which is kept")
    assert ("again", "changed.txt") not in found


def test_a_source_may_stay_as_it_is(project: Project) -> None:
    manifest = everywhere(project, "opt-out")
    raw = json.loads(manifest.read_text())
    raw["sources"][1]["deduplicate"] = False
    raw["sources"][2] |= {"deduplicate": False, "decontaminate": False}
    manifest.write_text(json.dumps(raw))
    assert set(build(manifest).info.rejected) == {"split"}


def test_a_build_killed_while_it_marks_ends_in_the_same_bytes(project: Project) -> None:
    def contents(folder: Path) -> dict[str, bytes]:
        files = [path for name in ("out", "token-store") for path in (folder / name).rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    undisturbed = everywhere(project, "undisturbed")
    build(undisturbed)
    manifest = everywhere(project, "killed")
    rng = random.Random(0)
    for workers in (1, 2, 1):
        command = [sys.executable, "-m", "lwm_data.cli", "build", str(manifest), "--workers", str(workers)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, cwd=DEMO.parents[1])
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(b"mark texts"):
                time.sleep(rng.random() * 0.1)
                process.kill()
                break
        assert process.wait(60) == -signal.SIGKILL
        process.stderr.read()  # until its workers are gone
        process.stderr.close()
    build(manifest)
    assert contents(manifest.parent) == contents(undisturbed.parent)
