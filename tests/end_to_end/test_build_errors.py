"""Wrong input, through the real command line: exit code 2, and a message with file, key, got, wanted and remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lwm_data.cli import app
from lwm_data.terminal import run_app


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """fails(arg, ...) runs lwm-data, which must exit with 2 and no traceback; returns its error message."""

    def run(*args: object) -> str:
        assert run_app(app, [str(arg) for arg in args]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error[error.index("lwm-data: error: ") :]

    return run


def test_a_missing_file(project: Callable[..., Path], fails: Callable[..., str]) -> None:
    manifest = project(sources=[{"name": "b", "type": "books", "path": "bokks/*.txt"}])
    assert re.search(r"sources\.0\.path: got .*/bokks/\*\.txt: matches no file; wanted", fails("build", manifest))
    assert not (manifest.parent / "out").exists()


def test_a_missing_manifest_and_a_missing_dataset(fails: Callable[..., str], tmp_path: Path) -> None:
    assert "none.yaml: no such manifest" in fails("build", tmp_path / "none.yaml")
    assert "not a dataset, or its build did not finish" in fails("check", tmp_path)
    assert "not a dataset" in fails("show", tmp_path, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"book9\.txt: empty: 0 bytes"),
        (b"caf\xe9", r"book9\.txt: not UTF-8: byte 0xe9 at offset 3; convert the file to UTF-8"),
    ],
)
def test_an_empty_book_and_one_that_is_not_utf8(
    project: Callable[..., Path], fails: Callable[..., str], content: bytes, message: str
) -> None:
    manifest = project()
    (manifest.parent / "books" / "book9.txt").write_bytes(content)
    # The needles' haystack are the same files, and there each must be whole.
    error = fails("build", manifest)
    assert re.search(message.replace("book9", ".*book9"), error), error
    books_only = project(sources=[{"name": "b", "type": "books", "path": "books/*.txt"}])
    error = fails("build", books_only)
    assert "sources.0: 1 of 5 records are bad, more than max_rejected (0.05) allows" in error
    assert re.search(message, error), error
    assert not (manifest.parent / "out" / "index.json").exists()
    assert run_app(app, ["build", str(books_only), "--set", "max_rejected=0.2"]) == 0


def test_a_misspelt_key(project: Callable[..., Path], fails: Callable[..., str]) -> None:
    error = fails("build", project(row_lenght=512))
    assert re.search(r"dataset\.yaml:1: row_lenght: unknown key; wanted one of: .*did you mean `row_length`\?", error)
    error = fails("build", project(), "--set", "row_lengt=512")
    assert "row_lengt: unknown key" in error and "did you mean `row_length`?" in error


def test_a_row_too_short_for_a_book(project: Callable[..., Path], fails: Callable[..., str]) -> None:
    manifest = project(sources=[{"name": "b", "type": "books", "path": "books/*.txt", "overflow": "error"}])
    wanted = r"b: book0\.txt: [\d,]+ tokens do not fit a row of 256 \(row_length\); set overflow: split, or raise"
    assert re.search(wanted, fails("build", manifest))
    assert run_app(app, ["build", str(manifest), "--set", "row_length=8192"]) == 0


def test_a_row_too_short_for_needles(project: Callable[..., Path], fails: Callable[..., str]) -> None:
    error = fails("build", project(row_length=240))
    assert "sources.2.tokens.max: got 250; wanted at most the row_length, 240" in error
    needles = {"name": "n", "type": "needles", "count": 3, "haystack": "books/*.txt", "tokens": 30}
    assert "raise tokens.min" in fails("build", project(sources=[needles]))


def test_a_tokenizer_that_is_not_the_one_promised(project: Callable[..., Path], fails: Callable[..., str]) -> None:
    manifest = project()
    model = manifest.parent / "demo-text.model"
    model.write_bytes(model.read_bytes() + b"x")
    error = fails("build", manifest)
    assert re.search(r"demo-text\.yaml: sha256: demo-text\.model has \w{64}, the spec wants \w{64}; restore", error)


@pytest.mark.parametrize("verb", [("check",), ("show", 0)])
def test_a_truncated_shard(project: Callable[..., Path], fails: Callable[..., str], verb: tuple[object, ...]) -> None:
    manifest = project()
    assert run_app(app, ["build", str(manifest)]) == 0
    shard = manifest.parent / "out" / "shard-000000.tar"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[: size // 2])
    error = fails(verb[0], manifest.parent / "out", *verb[1:])
    assert re.search(rf"shard-000000\.tar: {size // 2:,} bytes, the index says {size:,}", error), error


def test_a_row_that_is_not_there(project: Callable[..., Path], fails: Callable[..., str]) -> None:
    manifest = project()
    assert run_app(app, ["build", str(manifest)]) == 0
    assert re.search(r"ROW: got 99999; .* has rows 0 to \d+", fails("show", manifest.parent / "out", 99999))


def test_wrong_options(project: Callable[..., Path], fails: Callable[..., str]) -> None:
    assert "--workers: got 0; wanted 1 or more" in fails("build", project(), "--workers", 0)
    kinds = "dataset, qa, qa_prompt, text_tokenizer, vision_tokenizer"
    assert f"KIND: got datset; wanted {kinds}" in fails("schema", "datset")
    assert "--set row_length: wanted key=value" in fails("build", project(), "--set", "row_length")


def test_a_chat_that_does_not_fit(project: Callable[..., Path], fails: Callable[..., str]) -> None:
    manifest = project(sources=[{"name": "c", "type": "chats", "path": "chats.jsonl", "overflow": "error"}])
    error = fails("build", manifest, "--set", "row_length=20")
    assert re.search(r"c: chat-0: \d+ tokens do not fit a row of 20 \(row_length\); set overflow: drop", error), error


def test_nothing_left_to_build_from(project: Callable[..., Path], fails: Callable[..., str]) -> None:
    manifest = project(sources=[{"name": "c", "type": "chats", "path": "chats.jsonl"}])
    assert "no record is left to build from" in fails("build", manifest, "--set", "row_length=20")
