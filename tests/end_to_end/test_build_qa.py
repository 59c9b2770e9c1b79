"""Datasets of questions about real novels, through the real chunker and the real build."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from lwm_data.build import BuildResult, build
from lwm_data.check import check_dataset
from lwm_data.cli import app
from lwm_data.format.dataset import open_dataset
from lwm_data.format.vocab import TextTokenizer
from lwm_data.manifest_sources import Needles
from lwm_data.qa.chunks import Chunker
from lwm_data.sources.files import InputFile, find_files, hash_file, read_text
from lwm_data.sources.needles import read_needles
from lwm_data.sources.qa import asked_of
from lwm_data.sources.record import Record

DEMO = Path(__file__).parents[2] / "manifests" / "demo"
NOVELS = str(DEMO / "novels" / "[achw]*.txt")  # the five shorter ones


def _pairs(tokenizer: TextTokenizer) -> Iterator[dict[str, Any]]:
    """A pair of each chunk of 1,000 tokens: the question quotes it, the answer is what comes next."""
    chunker = Chunker(tokenizer, 1000)
    for file in find_files(NOVELS, "books"):
        known = hash_file(None, file)
        for chunk in chunker.cut(read_text(file.path)):
            words = chunk.text.split()
            if len(words) > 60:
                yield {
                    "id": f"{file.key}:{chunk.number}:0",
                    "question": f"Which words follow {' '.join(words[40:46])!r}?",
                    "answer": " ".join(words[46:50]),
                    "book": file.key,
                    "book_sha256": known.sha256,
                    "chunk": chunk.number,
                    "chars": list(chunk.chars),
                    "tokens": list(chunk.tokens),
                    "chunk_sha256": chunk.sha256,
                    "tokenizer": tokenizer.fingerprint,
                    "language": "en",
                }


@pytest.fixture(scope="module")
def pairs(demo_tokenizer: TextTokenizer) -> list[dict[str, Any]]:
    return list(_pairs(demo_tokenizer))


@pytest.fixture
def qa_project(project: Callable[..., Path], pairs: list[dict[str, Any]]) -> Callable[..., Path]:
    """As `project`, with the one source `book-qa` about real novels; keys are of the source."""

    def make(name: str, row_length: int, **keys: Any) -> Path:
        source = {"name": "book-qa", "type": "qa", "path": "qa.jsonl", "books": NOVELS, "tokens": row_length} | keys
        manifest = project(name, row_length=row_length, shard_size="1MB", sources=[source])
        (manifest.parent / "qa.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
        return manifest

    return make


def _examples(result: BuildResult) -> list[dict[str, Any]]:
    return [line for path in sorted(result.out.glob("*.parquet")) for line in pq.read_table(path).to_pylist()]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("row_length", "join", "order"), [(32_768, 1, "interleaved"), (32_768, 2, "random"), (131_072, 5, "reading")]
)
def test_rows_of_real_novels_have_loss_on_answers_only_and_below_one_percent(
    qa_project: Callable[..., Path],
    pairs: list[dict[str, Any]],
    demo_tokenizer: TextTokenizer,
    row_length: int,
    join: int,
    order: str,
) -> None:
    result = build(qa_project("qa", row_length, join=join, order=order))
    dataset = open_dataset(result.out)
    assert check_dataset(dataset, lambda rows: None) == []
    examples = _examples(result)
    assert sum(len(asked_of(example["key"])) for example in examples) == len(pairs), "each pair is asked once"
    assert max(example["num_tokens"] for example in examples) > 0.97 * row_length
    assert all(example["num_trained"] <= 0.01 * example["num_tokens"] for example in examples)
    answers = {pair["answer"] for pair in pairs}
    found = 0
    for row in range(len(dataset)):
        arrays = dataset[row]
        is_trained = arrays["loss_weights"] > 0
        assert is_trained.sum() <= 0.01 * row_length
        begins = np.flatnonzero(np.diff(is_trained.astype(int)) == 1) + 1
        ends = np.flatnonzero(np.diff(is_trained.astype(int), append=0) == -1)
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            assert arrays["tokens"][end] == demo_tokenizer.eos
            assert demo_tokenizer.decode(arrays["tokens"][begin:end].astype(np.int32)) in answers
            found += 1
    assert found == len(pairs)


def test_two_workers_write_the_bytes_of_one(qa_project: Callable[..., Path]) -> None:
    one = build(qa_project("one", 32_768, depth="uniform"), workers=1)
    two = build(qa_project("two", 32_768, depth="uniform"), workers=2)
    assert _bytes(one.out) == _bytes(two.out)
    assert _bytes(one.out.parent / "token-store") == _bytes(two.out.parent / "token-store")


def test_a_longer_row_tokenizes_nothing_again(qa_project: Callable[..., Path]) -> None:
    manifest = qa_project("qa", 32_768, join=2)
    before = {path.name: path.stat().st_mtime_ns for path in (build(manifest).out.parent / "token-store").iterdir()}
    after = build(manifest, ["row_length=65536"])
    assert after.built
    assert before == {path.name: path.stat().st_mtime_ns for path in (after.out.parent / "token-store").iterdir()}


def test_a_row_is_shown_with_its_book_and_its_questions(qa_project: Callable[..., Path]) -> None:
    result = build(qa_project("qa", 32_768))
    shown = CliRunner().invoke(app, ["show", str(result.out), "0", "--json"])
    assert shown.exit_code == 0
    (segment, *_) = json.loads(shown.stdout)["segments"]
    texts = [(run["text"], run["weight"] > 0) for run in segment["runs"]]
    assert texts[0][0].startswith("<s> You are a helpful assistant. USER:") and not texts[0][1]
    assert "Which words follow" in texts[0][0] and texts[0][0].endswith("ASSISTANT:")
    assert texts[1][1] and texts[1][0].endswith("</s>")
    assert texts[2][0].startswith(" USER: Which words follow") and not texts[2][1]


def test_an_example_longer_than_a_row_is_refused_before_anything_is_read(qa_project: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"sources.0.tokens.max: got 32,768; wanted at most the row_length, 1,024"):
        build(qa_project("qa", 32_768), ["row_length=1024"])


def test_pairs_of_other_books_stop_the_build(qa_project: Callable[..., Path]) -> None:
    manifest = qa_project("qa", 32_768, books=str(DEMO / "novels" / "alice*.txt"))
    with pytest.raises(ValueError, match=r"no such book: call_of_the_wild.txt: not among `books`"):
        build(manifest)


def test_examples_made_of_an_evaluations_haystack_are_left_out(
    qa_project: Callable[..., Path], demo_tokenizer: TextTokenizer
) -> None:
    """Needles and questions alike: `contamination` names the files of the evaluation's haystack."""
    manifest = qa_project("qa", 32_768)
    haystack = str(DEMO / "novels" / "alice*.txt")
    needles = {"name": "needles", "type": "needles", "count": 5, "haystack": haystack, "tokens": 1000}
    sources = [*json.loads(manifest.read_text())["sources"], needles]
    rule = {"contamination": {"texts": [haystack]}, "sources": sources}
    result = build(manifest, [f"{key}={json.dumps(value)}" for key, value in rule.items()])
    info = result.info
    assert info.sources["needles"].reasons == {"contaminated": 5} and info.sources["needles"].examples == 0
    assert info.sources["book-qa"].reasons["contaminated"] > 1
    assert not [line for line in _examples(result) if "alice" in line["key"]]


def test_no_needle_is_an_evaluations_own_whatever_the_seeds(
    demo_tokenizer: TextTokenizer, corpus_text: str, tmp_path: Path
) -> None:
    """Equal seeds and haystacks: the numbers are drawn apart, for no source can be named like an evaluation's case."""
    from lwm_train.config import NeedleSpec
    from lwm_train.evaluate.needle import needle_prompts

    (tmp_path / "a.txt").write_text(corpus_text[:6000], encoding="utf-8")
    file = hash_file(None, InputFile(str(tmp_path / "a.txt"), "a.txt"))
    spec = NeedleSpec(haystack="a.txt", lengths=(150, 200), depths=(0, 0.5, 1), rounds=10)
    asked = {str(prompt.number) for prompt in needle_prompts(demo_tokenizer, corpus_text[:6000], spec)}
    source = Needles.model_validate(
        {"name": "150", "type": "needles", "count": 60, "haystack": "a.txt", "tokens": {"min": 150, "max": 200}}
    )
    trained: set[str] = set()
    for record in read_needles(source, spec.seed, (file,), 0, source.count, demo_tokenizer):
        assert isinstance(record, Record)
        trained |= set(re.findall(r"\d{7}", demo_tokenizer.decode(record.runs[-2].tokens)))
    assert len(asked) == 60 and len(trained) == 60 and not asked & trained
    with pytest.raises(ValueError, match="name"):
        Needles.model_validate(source.model_dump() | {"name": "150/0.5"})


def test_no_manifest_here_trains_on_the_haystack_of_an_evaluation() -> None:
    read = {path: yaml.safe_load(path.read_text(encoding="utf-8")) for path in DEMO.parent.rglob("*.yaml")}
    evaluations = {path: of for path, of in read.items() if of["kind"] == "eval"}
    heldout = {(path.parent / of["heldout"]).resolve() for path, of in evaluations.items() if "heldout" in of}
    datasets = {
        path: of
        for path, of in read.items()
        if of["kind"] == "dataset" and (path.parent / of["out"]).resolve() not in heldout
    }
    trained = [
        file
        for path, of in datasets.items()
        for source in of["sources"]
        for key in {"path", "haystack", "books"} & source.keys()
        for file in path.parent.glob(source[key])
        if file.is_file()
    ]
    asked = [file for path, of in evaluations.items() for file in path.parent.glob(of["needle"]["haystack"])]
    assert trained and asked
    assert not {file.read_bytes() for file in trained} & {file.read_bytes() for file in asked}
