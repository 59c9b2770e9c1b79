"""The tokenizer that we train gives back every text, and the same files give the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def test_a_vocabulary_too_large_for_the_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a few words, no more")
    with pytest.raises(ValueError, match="--vocab-size: got 5000"):
        train_text_tokenizer([str(tmp_path / "a.txt")], 5000, tmp_path / "t.yaml")
