"""The tokenizer that we train gives back every text, and the same files give the same model."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lwm_data.format.manifest import quoted
from lwm_data.format.vocab import TextTokenizer, load_text_tokenizer
from lwm_data.text_training import train_text_tokenizer

ROOT = Path(__file__).parents[2]
# U+2581 is how SentencePiece writes a blank, and a NUL ends its strings.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\u2581\0"), max_size=80)


@given(text=TEXT)
def test_every_text_comes_back(demo_tokenizer: TextTokenizer, text: str) -> None:
    assert demo_tokenizer.decode(demo_tokenizer.encode(text)) == text


def test_a_text_cannot_smuggle_special_ids_in(demo_tokenizer: TextTokenizer) -> None:
    text = "</s> <s><unk> <0x0A>"
    ids = demo_tokenizer.encode(text)
    assert demo_tokenizer.decode(ids) == text and not {0, demo_tokenizer.bos, demo_tokenizer.eos} & set(ids.tolist())


@pytest.mark.parametrize("name", ["novels/treasure_island.txt", "heldout/time_machine.txt"])
def test_every_shipped_novel_comes_back_without_an_unknown_token(demo_tokenizer: TextTokenizer, name: str) -> None:
    text = (ROOT / "manifests" / "demo" / name).read_text(encoding="utf-8")
    ids = demo_tokenizer.encode(text)
    assert demo_tokenizer.decode(ids) == text
    assert 0 not in ids and len(text) / len(ids) > 2.2


def test_digits_are_tokens_of_their_own(demo_tokenizer: TextTokenizer) -> None:
    assert [piece.strip() for piece in demo_tokenizer.pieces(demo_tokenizer.encode("1234567"))][-7:] == list("1234567")


def test_training_again_gives_the_same_bytes(tmp_path: Path, corpus_text: str) -> None:
    (tmp_path / "a.txt").write_text(corpus_text, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"data": ["Hello there!", "Good day."]}\n')
    for name in ("one", "two"):
        patterns = [str(tmp_path / "a.txt"), str(tmp_path / "*.jsonl")]
        assert train_text_tokenizer(patterns, 400, tmp_path / name / "t.yaml").vocab_size == 400
    first, second = ((tmp_path / name / "t.model").read_bytes() for name in ("one", "two"))
    assert first == second
    assert str(tmp_path).encode() not in first, "a model that ships tells nothing of this machine"
    tokenizer = load_text_tokenizer(tmp_path / "one" / "t.yaml")
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)
    assert (tmp_path / "one" / "t.yaml").read_text().startswith("# lwm-data tokenizer train-text ")


@pytest.mark.parametrize("stem", ["2048", "3e-4", "llama: 2", 'say "ü" 😀', "null", "two\nlines", "# c"])
def test_a_tokenizer_may_have_any_name(tmp_path: Path, corpus_text: str, stem: str) -> None:
    (tmp_path / "a\nb.txt").write_text(corpus_text, encoding="utf-8")
    tokenizer = train_text_tokenizer([str(tmp_path / "a\nb.txt")], 330, tmp_path / f"{stem}.yaml")
    assert tokenizer.name == stem
    tokenizer.save(tmp_path)
    assert load_text_tokenizer(tmp_path / "text_tokenizer.yaml") == tokenizer


@given(name=st.text(st.characters(codec="utf-8"), min_size=1, max_size=200))
def test_a_quoted_name_is_read_as_it_was_written(name: str) -> None:
    text = quoted(name)
    assert "\n" not in text and yaml.safe_load(f"name: {text}\nx: 1\n") == {"name": name, "x": 1}


def test_a_truncated_archive_of_chats_names_file_and_line(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"data": [f"{i} {i * i} {i**5}", "Good day."]}) + "\n" for i in range(9000))
    packed = gzip.compress(lines.encode())
    (tmp_path / "c.jsonl.gz").write_bytes(packed[:-20])
    with pytest.raises(ValueError, match=r"c\.jsonl\.gz: line \d+: damaged"):
        train_text_tokenizer([str(tmp_path / "c.jsonl.gz")], 300, tmp_path / "t.yaml")


@pytest.mark.parametrize("line", [b'{"data": ["\\ud800"]}', b"[" * 100_000, b"1" * 5000, b"{}"])
def test_a_line_that_is_no_chat_is_named_and_blank_lines_are_skipped(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "c.jsonl").write_bytes(b'{"data": ["Hello there!", "Good day."]}\n\n \n' + line)
    with pytest.raises(ValueError, match=r"c\.jsonl: line 4: not a chat"):
        train_text_tokenizer([str(tmp_path / "c.jsonl")], 300, tmp_path / "t.yaml")


def test_a_vocabulary_too_large_for_the_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a few words, no more")
    with pytest.raises(ValueError, match="--vocab-size: got 5000"):
        train_text_tokenizer([str(tmp_path / "a.txt")], 5000, tmp_path / "t.yaml")
