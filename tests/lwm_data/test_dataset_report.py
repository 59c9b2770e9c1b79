"""A dataset's page tells what the dataset holds, stays small, and shows hostile data as text."""

from __future__ import annotations

import hashlib
import html
import json
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from lwm_data.build import build
from lwm_data.check import check_dataset
from lwm_data.cli import app
from lwm_data.format.dataset import Dataset, open_dataset
from lwm_data.format.example import text_runs, vision_runs
from lwm_data.format.vocab import TextTokenizer
from lwm_data.report.charts import log_bin, log_histograms
from lwm_data.report.counts import count
from lwm_data.report.page import write_dataset_page
from lwm_data.report.rejected import PER_REASON, read_rejected
from lwm_data.report.rows import sample_rows
from lwm_data.sources.record import Record
from lwm_data.terminal import run_app
from tests.conftest import DEMO, ROOT
from tests.tiny_vision import TINY, with_tokenizer, write_tiny_tokenizer

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}\x1b[2J\u202eabc"


class Words(HTMLParser):
    """The text of a page, and its tags with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags = "", list[tuple[str, dict[str, str | None]]]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def reported(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    """What `lwm-data report ... --json` says; it must succeed."""
    capsys.readouterr()
    assert run_app(app, ["report", *map(str, args), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    capsys.readouterr()
    assert run_app(app, ["report", *map(str, args)]) == 2
    return capsys.readouterr().err


def page_of(dataset: Dataset, path: Path, rows: int = 8) -> Words:
    write_dataset_page(path, dataset, rows, 0)
    return Words(path.read_text(encoding="utf-8"))


def lines_of(dataset: Dataset) -> list[dict[str, Any]]:
    """The lines of all examples.parquet, with the row's number in the dataset."""
    lines, first = [], 0
    for shard in dataset.info.shards:
        table = pq.read_table(f"{dataset.url}/{shard.name.removesuffix('.tar')}.examples.parquet").to_pylist()
        lines += [line | {"row": line["row"] + first} for line in table]
        first += shard.num_rows
    return lines


@pytest.fixture
def built(project: Callable[..., Path]) -> Dataset:
    manifest = project()
    build(manifest)
    return open_dataset(manifest.parent / "out")


@pytest.mark.parametrize("packing", ["masked", "naive"])
@pytest.mark.parametrize("weighting", ["example", "token"])
def test_shares_and_fills_are_those_of_the_rows_themselves(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str], packing: str, weighting: str
) -> None:
    manifest = project(packing=packing, loss_weighting=weighting)
    build(manifest)
    dataset = open_dataset(manifest.parent / "out")
    told = reported(capsys, dataset.url, "--rows", 0)["sources"]

    loss = dict.fromkeys(dataset.info.sources, 0.0)
    tokens = dict.fromkeys(dataset.info.sources, 0)
    fills: dict[str, list[float]] = {name: [] for name in dataset.info.sources}
    lines = lines_of(dataset)
    for row in range(len(dataset)):
        arrays, at = dataset[row], 0
        held = [line for line in lines if line["row"] == row]
        for line in held:
            stop = at + line["num_tokens"]
            loss[line["source"]] += float(arrays["loss_weights"][at:stop].sum())
            tokens[line["source"]] += stop - at
            at = stop
        for name in {line["source"] for line in held}:
            fills[name].append(float((arrays["segment_ids"] > 0).mean()))
    for name, of in told.items():
        assert of["share"] == pytest.approx(tokens[name] / sum(tokens.values()))
        # A naive row's first token weighs nothing, though it may be the middle of an example.
        assert of["loss_share"] == pytest.approx(loss[name] / sum(loss.values()), abs=2e-3)
        assert of["fill"] == pytest.approx(np.mean(fills[name]))


def test_every_number_of_the_index_stands_in_the_page(built: Dataset, tmp_path: Path) -> None:
    words = page_of(built, tmp_path / "page.html").text
    for name, of in built.info.sources.items():
        line = re.search(rf"\n{name}([\d,.%–]*)\n", words.replace("\n\n", "\n"))
        numbers = (of.records, of.kept, of.split, of.truncated, of.rejected, of.left_out, of.examples, of.tokens)
        assert line is not None and line[1].startswith("".join(f"{number:,}" for number in numbers)), name
    assert f"{built.info.num_tokens:,}" in words and built.info.fingerprint in words


def test_histograms_and_mix_hold_every_example_row_and_token(built: Dataset) -> None:
    counts, lines = count(built), lines_of(built)
    names = list(built.info.sources)
    assert len(built.info.shards) > 3
    for number, name in enumerate(names):
        lengths = [line["num_tokens"] for line in lines if line["source"] == name]
        assert counts.examples[number] == len(lengths) == counts.lengths[number].sum()
        assert counts.longest[number] == max(lengths) and counts.tokens[number] == sum(lengths)
        for b in np.flatnonzero(counts.lengths[number]).tolist():
            assert counts.lengths[number, b] == sum(2 ** (b / 2) <= n < 2 ** ((b + 1) / 2) for n in lengths)
    assert counts.fills.sum() == len(built)
    assert counts.mix.sum() == built.info.num_tokens

    some = count(built, most=3)
    assert some.shards.tolist()[0] == 0 and some.shards.tolist()[-1] == len(built.info.shards) - 1
    assert (some.mix == counts.mix[some.shards]).all()


def test_a_length_is_in_the_bin_that_its_title_says() -> None:
    lengths = np.array([1, 2, 3, 4, 5, 6, 255, 256, 362, 363, 1 << 20, (1 << 31) - 1])
    counts = np.bincount(log_bin(lengths), minlength=64)[np.newaxis]
    (histogram,) = log_histograms(counts, [("x", "", 0)], "tokens")
    found = []
    for bar in histogram.bars:
        low, high, number = (int(n.replace(",", "")) for n in re.findall(r"[\d,]+", bar.title))
        assert ((lengths >= low) & (lengths <= high)).sum() == number
        found.append(number)
        assert bar.x >= 0 and bar.x + bar.width <= 100.1 and 0 < bar.height <= 100
    assert sum(found) == len(lengths)
    assert log_histograms(counts * 0, [("x", "", 0)], "tokens") == []


def test_the_same_seed_draws_the_same_rows_and_the_page_has_the_same_bytes(
    built: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in Path(built.url).iterdir()}
    told = reported(capsys, built.url, "--seed", 3, "--rows", 5)
    page = Path(told["out"])
    assert page == tmp_path / "project" / "out-report.html" and told["rows"] == sample_rows(built, 5, 3)
    assert len(set(told["rows"])) == 5 and told["bytes"] == page.stat().st_size
    first = page.read_bytes()
    assert reported(capsys, built.url, "--seed", 3, "--rows", 5) == told and page.read_bytes() == first
    assert reported(capsys, built.url, "--seed", 4, "--rows", 5)["rows"] != told["rows"]
    assert sample_rows(built, 10_000, 0) == list(range(len(built)))
    assert {path.name: path.read_bytes() for path in Path(built.url).iterdir()} == before
    assert check_dataset(built, lambda _: None) == [] and not list(page.parent.glob(".*.tmp"))


def test_a_dataset_by_url_has_the_page_of_the_folder(
    built: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fsspec.filesystem("memory").put(built.url, "/report-test/data", recursive=True)
    monkeypatch.chdir(tmp_path)
    told = reported(capsys, "memory://report-test/data")
    assert Path(told["out"]) == Path("data-report.html")
    write_dataset_page(tmp_path / "local.html", built, 8, 0)
    local = (tmp_path / "local.html").read_text().replace(built.url, "memory://report-test/data")
    assert Path("data-report.html").read_text() == local


def test_hostile_data_are_text(
    dataset_of: Callable[..., Dataset], demo_tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    ids = demo_tokenizer.encode(HOSTILE)
    made = dataset_of(tmp_path, [Record(HOSTILE, text_runs(demo_tokenizer, [(ids, True)], eos=True))], row_length=300)
    (Path(made.url) / "rejected.jsonl").write_text(
        json.dumps({"source": "made", "key": HOSTILE, "reason": HOSTILE, "detail": "\ud800" + HOSTILE})
        + "\nnot json\n"
        + json.dumps([1])
        + "\n"
    )
    info = made.info.model_copy(update={"name": HOSTILE, "manifest": {HOSTILE: HOSTILE}, "rejected": {HOSTILE: 1}})
    dataset = Dataset(made.url, info)
    told = write_dataset_page(tmp_path / "page.html", dataset, 8, 0)
    source = (tmp_path / "page.html").read_bytes().decode("utf-8")
    page = Words(source)
    assert [tag for tag, _ in page.tags].count("script") == 1 and "img" not in [tag for tag, _ in page.tags]
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert not [char for char in source if ord(char) < 32 and char not in "\n\t"] and "\x9b" not in source
    assert page.text.count("<img src=x onerror=alert(1)>") >= 5, "title, text, key, reason, detail, manifest"
    assert "{{ 7*7 }}" in page.text and "\u241b[2J" in page.text
    assert page.text.count("not a line of rejected.jsonl") == 2
    assert told["problems"] == []


def test_the_page_is_small_whatever_the_rows_hold(
    dataset_of: Callable[..., Dataset], demo_tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    """Many short runs, and texts of nothing but what must be escaped."""
    short = demo_tokenizer.encode("<")
    many = [(short, number % 2 == 0) for number in range(1500)]
    long = demo_tokenizer.encode("<&" * 3000)
    records = [Record(f"{'<' * 500}{i}", text_runs(demo_tokenizer, many, eos=True)) for i in range(20)]
    records += [Record(f"long{i}", text_runs(demo_tokenizer, [(long, True)], eos=True)) for i in range(20)]
    dataset = dataset_of(tmp_path, records, row_length=len(long) + 10)
    page = page_of(dataset, tmp_path / "page.html", rows=500)
    assert (tmp_path / "page.html").stat().st_size < 5_000_000
    assert "more runs left out" in page.text
    few = page_of(dataset, tmp_path / "page.html", rows=2)
    assert "characters left out" in few.text


def test_pictures_are_drawn_and_where_they_cannot_be_the_page_says_why(
    dataset_of: Callable[..., Dataset], demo_tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = np.random.default_rng(0).integers(0, TINY.num_codes, (4, 256), dtype=np.int32)
    caption = demo_tokenizer.encode("A cat.")
    runs = text_runs(demo_tokenizer, [(caption, False)], eos=False)
    record = Record("clip", (*runs, *vision_runs(demo_tokenizer, codes, trained=True)))
    dataset = dataset_of(tmp_path, [record], row_length=1200)
    without = page_of(dataset, tmp_path / "page.html")
    assert "[vision 1,028 tokens: 4 frames]" in without.text and "No pictures:" in without.text

    dataset = with_tokenizer(dataset, write_tiny_tokenizer(tmp_path / "tiny.yaml"))
    told = write_dataset_page(tmp_path / "page.html", dataset, 8, 0)
    page = Words((tmp_path / "page.html").read_text())
    (picture,) = [attrs for tag, attrs in page.tags if tag == "img"]
    assert str(picture["src"]).startswith("data:image/jpeg;base64,") and told["pictures"] == 1
    assert picture["alt"] == "[vision 1,028 tokens: 4 frames]"

    monkeypatch.setitem(sys.modules, "lwm_data.vision.vqgan", None)  # as where torch is not installed
    lacking = page_of(dataset, tmp_path / "page.html")
    assert "No pictures:" in lacking.text and "pip install" in lacking.text
    assert "[vision 1,028 tokens: 4 frames]" in lacking.text


def test_the_first_of_each_reason_are_listed(tmp_path: Path) -> None:
    lines = [
        {"source": source, "key": f"{source}-{i}", "reason": reason, "detail": "d" * 5000}
        for i in range(PER_REASON + 5)
        for source in ("a", "b")
        for reason in ("too long", "not UTF-8")
    ]
    (tmp_path / "rejected.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_rejected(str(tmp_path))
    assert found.num_read == len(lines) and not found.is_cut
    assert len(found.records) == 4 * PER_REASON
    assert [r.key for r in found.records if (r.source, r.reason) == ("b", "too long")] == [
        f"b-{i}" for i in range(PER_REASON)
    ]
    assert max(len(r.detail) for r in found.records) < 300
    (tmp_path / "rejected.jsonl").unlink()
    assert read_rejected(str(tmp_path)).records == []


def test_what_is_damaged_is_named(built: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = Path(built.url) / "shard-000001.examples.parquet"
    whole = examples.read_bytes()
    examples.write_bytes(whole[:-40])
    assert "shard-000001.examples.parquet: not the examples of its shard" in refused(capsys, built.url)
    table = pq.read_table(Path(built.url) / "shard-000000.examples.parquet")
    pq.write_table(table.set_column(table.schema.get_field_index("row"), "row", table["num_tokens"]), examples)
    assert "a row beyond the shard's last" in refused(capsys, built.url)
    examples.write_bytes(whole)
    assert "--rows: got 501; wanted 0 to 500" in refused(capsys, built.url, "--rows", 501)
    assert "wanted the name of a file" in refused(capsys, built.url, "--out", tmp_path)
    assert "no index.json" in refused(capsys, tmp_path)
    assert "is no run of `lwm-data qa`" in refused(capsys, built.url, "--books", "*.txt")


def test_both_reports_have_the_same_colours() -> None:
    def palette(path: Path) -> list[str]:
        return re.findall(r"--\w+: #[0-9a-f]{6};", path.read_text())

    ours = palette(ROOT / "lwm_data" / "report" / "report.css")
    assert ours == palette(ROOT / "lwm_train" / "report.html.j2") and len(ours) > 30


# Questions and answers


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A run's folder: 30 pairs of two books, of 40 words each chunk, and three that were rejected."""
    folder = tmp_path / "run"
    folder.mkdir()
    lines, rejected = [], []
    for book in ("alice_in_wonderland.txt", "moby_dick.txt"):
        text = (DEMO / "novels" / book).read_text(encoding="utf-8")
        shutil.copy(DEMO / "novels" / book, tmp_path)
        for chunk in range(15):
            start, stop = 5000 * chunk, 5000 * chunk + 1000
            lines.append(
                {
                    "id": f"{book}:{chunk}:0",
                    "question": f"What stands in {chunk}? {HOSTILE}",
                    "answer": text[start + 500 : start + 530],
                    "book": book,
                    "book_sha256": hashlib.sha256(text.encode()).hexdigest(),
                    "chunk": chunk,
                    "chars": [start, stop],
                    "tokens": [400 * chunk, 400 * chunk + 300],
                    "chunk_sha256": hashlib.sha256(text[start:stop].encode()).hexdigest(),
                    "model": "demo",
                }
            )
        where = {"book": book, "chunk": 1, "chars": [5000, 6000]}
        rejected.append(where | {"question": "Who?", "answer": "He.", "reason": "not grounded", "raw": HOSTILE})
    rejected.append({"book": "x.txt", "reason": "not UTF-8", "detail": "byte 0xff"})
    (folder / "qa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "rejected.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rejected), encoding="utf-8")
    return folder


def evidence(page: str) -> list[tuple[str, str]]:
    """(chunk, what is marked in it) of each pair with evidence."""
    chunks = re.findall(r'<span class="chunk">(.*?)</span>', page, flags=re.DOTALL)
    return [
        (
            html.unescape(re.sub(r"</?mark>", "", chunk)),
            html.unescape("".join(re.findall(r"<mark>(.*?)</mark>", chunk, flags=re.DOTALL))),
        )
        for chunk in chunks
    ]


def test_pairs_stand_beside_the_chunk_that_was_asked_about(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = reported(capsys, pairs, "--books", pairs.parent / "*.txt", "--rows", 7)
    assert told | {"bytes": 0} == {
        "out": str(pairs.parent / "run-report.html"),
        "bytes": 0,
        "pairs": 30,
        "shown": 7,
        "books": 2,
        "rejected": {"not UTF-8": 1, "not grounded": 2},
        "without_evidence": 0,
    }
    page = Path(told["out"]).read_text(encoding="utf-8")
    lines = [json.loads(line) for line in (pairs / "qa.jsonl").read_text().splitlines()]
    texts = {name: (pairs.parent / name).read_text(encoding="utf-8") for name in {line["book"] for line in lines}}
    wanted = {texts[line["book"]][slice(*line["chars"])]: line["answer"] for line in lines}
    found = evidence(page)
    assert len(found) == 9, "seven pairs that were kept and two that were not"
    for chunk, marked in found[:7]:
        assert marked.startswith(wanted[chunk].strip().rstrip("."))
    assert "<img" not in page and page.count("<script>") == 1

    by_manifest = pairs.parent / "qa.yaml"
    prompt, tokenizer = ROOT / "manifests/qa/prompts/questions.yaml", ROOT / "tokenizers/demo-text.yaml"
    keys = {"kind": "qa", "name": "x", "out": "run", "books": "*.txt", "prompt": str(prompt)}
    keys |= {"text_tokenizer": str(tokenizer), "endpoint": {"url": "http://127.0.0.1:1/v1", "model": "demo"}}
    by_manifest.write_text(json.dumps(keys))
    again = reported(capsys, by_manifest, "--rows", 7)
    assert evidence(Path(again["out"]).read_text(encoding="utf-8")) == found


def test_evidence_that_is_not_there_is_told(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = reported(capsys, pairs / "qa.jsonl")
    assert told["without_evidence"] == told["shown"] == 8
    assert "name the books by --books" in Words(Path(told["out"]).read_text()).text
    (pairs.parent / "moby_dick.txt").unlink()
    book = pairs.parent / "alice_in_wonderland.txt"
    book.write_text("Another " + book.read_text())
    told = reported(capsys, pairs, "--books", pairs.parent / "*.txt", "--rows", 30)
    words = Words(Path(told["out"]).read_text()).text
    assert told["without_evidence"] == 30
    assert words.count("the book has changed since") == 15 and words.count("does not hold this book") == 16
    (pairs / "qa.jsonl").write_text('{"question": "a"}\n')
    assert "qa.jsonl:1: no pair" in refused(capsys, pairs)


def test_a_dataset_of_questions_shows_them_beside_their_evidence_and_their_depths(
    pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pairs.parent
    manifest = {
        "kind": "dataset",
        "name": "asked",
        "out": "out",
        "text_tokenizer": str(ROOT / "tokenizers" / "demo-text.yaml"),
        "row_length": 8192,
        "max_rejected": 1.0,
        "sources": [
            {
                "name": "asked",
                "type": "qa",
                "path": "run/qa.jsonl",
                "books": "*.txt",
                "tokens": 8192,
                "max_trained": 0.1,
            }
        ],
    }
    lines = [json.loads(line) for line in (pairs / "qa.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        line["question"] = f"What is number {number}?"
    (pairs / "qa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "asked.yaml").write_text(json.dumps(manifest))
    build(folder / "asked.yaml")
    dataset = open_dataset(folder / "out")
    told = reported(capsys, folder / "out", "--rows", 500)
    page = Path(told["out"]).read_text(encoding="utf-8")
    num_asked = count(dataset).depths.sum()
    assert 10 < num_asked <= 30
    found = evidence(page)
    assert len(found) == num_asked
    answer_of = {f"What is number {n}?": line["answer"] for n, line in enumerate(lines)}
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in {line["book"] for line in lines}}
    questions = re.findall(r'<div class="question text">(.*?)</div>', page, flags=re.DOTALL)
    for question, (chunk, marked) in zip(map(html.unescape, questions), found, strict=True):
        number = int(re.findall(r"What is number (\d+)\?$", question)[0])
        line = lines[number]
        assert chunk.strip() in texts[line["book"]] and answer_of[f"What is number {number}?"].strip() in chunk
        assert marked
    assert "Depth of the evidence" in page and f"{num_asked} questions" in page
