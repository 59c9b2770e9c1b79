"""The ids by words are SentencePiece's own, bit for bit: any model, any text, cut into any parts."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lwm_data.format import word_ids
from lwm_data.format.vocab import SHORT_TEXT, TextTokenizer
from lwm_data.format.word_ids import WordIds, load_word_ids

ROOT = Path(__file__).parents[2]
NOVELS = sorted((ROOT / "manifests" / "demo").glob("*/*.txt"))

LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
SYMBOLS = ["<x>", "\u2581\u2581\u2581", "\n\n", "a\u2581b", "the\u2581", "\u2581the", "!\u2581?", "end.\n"]
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "whole script mix": LLAMA | {"split_by_unicode_script": False, "split_by_number": False},
    "no dummy prefix": LLAMA | {"add_dummy_prefix": False},
    "blank pieces": LLAMA | {"allow_whitespace_only_pieces": True, "split_digits": True},
    "unknown characters": LLAMA | {"byte_fallback": False, "character_coverage": 0.98},
    "across words": LLAMA | {"split_by_whitespace": False},
    "blanks last": LLAMA | {"treat_whitespace_as_suffix": True},
    "blanks removed": LLAMA | {"remove_extra_whitespaces": True},
    "symbols": LLAMA | {"user_defined_symbols": SYMBOLS},
    "symbols, no fallback": LLAMA | {"user_defined_symbols": SYMBOLS, "byte_fallback": False},
    "symbols with blanks": LLAMA | {"user_defined_symbols": ["a b", " the"]},
    "nmt_nfkc": {"byte_fallback": True},
    "nmt_nfkc, symbols": {"user_defined_symbols": SYMBOLS},
    "nfkc": LLAMA | {"normalization_rule_name": "nfkc"},
    "nmt_nfkc_cf, no prefix": {"normalization_rule_name": "nmt_nfkc_cf", "add_dummy_prefix": False},
    "unigram": LLAMA | {"model_type": "unigram"},
    "character": LLAMA | {"model_type": "char"},
}
NOT_CUT = {"unigram", "character", "symbols with blanks"}

FRAGMENTS = [
    " ",
    " ",
    "  ",
    "     ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "\0",
    "\u2581",
    "\u2581\u2581\u2581",
    "\u3000",
    "\xa0",
]
FRAGMENTS += ["\u200b", "\u0301", "e\u0301", "\u00a8", "ﬁ", "Å", "ｶﾞ", "\ufeff", "\ufffd", "😀", "鯨", "\U0010ffff"]
FRAGMENTS += ["whale", " the", "the ", "don't", "“I", "--", "said,", "1234", "a b", "a\u2581b", "<x>", "<unk>", "</s>"]
FRAGMENTS += ["<0x0A>", "e" * 70, "ab" * 40, "!\u2581?", "! ?", "end.\n", "aaaa", "É"]
HOSTILE = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=6), max_size=60).map("".join)


@pytest.fixture(scope="module")
def models(corpus_text: str) -> dict[str, bytes]:
    """One small model for each of MODELS, trained on a piece of a novel."""

    def lines() -> Iterator[str]:
        yield from corpus_text[:16_000].split("\n")
        yield from ["a b, a b:  x", "été ﬁn 鯨 ｶﾞ", "aaaa eeee ababab", "1234 12 1999"] * 5

    trained = {}
    for name, options in MODELS.items():
        model = io.BytesIO()
        wanted = {"model_type": "bpe", "vocab_size": 420, "num_threads": 1, "minloglevel": 2, "hard_vocab_limit": False}
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines(), model_writer=model, **wanted | options)
        trained[name] = model.getvalue()
    return trained


def by_words(words: WordIds, parts: list[str]) -> list[int]:
    return [int(i) for ids in words.encode(parts) for i in ids]


def by_sentencepiece(model: bytes, text: str) -> list[int]:
    found: list[int] = sentencepiece.SentencePieceProcessor(model_proto=model).encode(text)
    return found


@pytest.mark.parametrize("name", [name for name in MODELS if name not in NOT_CUT])
def test_ids_by_words_are_those_of_the_whole_text(
    models: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    words = load_word_ids(models[name])
    assert words is not None
    processor = sentencepiece.SentencePieceProcessor(model_proto=models[name])

    @settings(max_examples=60)
    @given(text=HOSTILE, block=st.integers(1, 200), table_bytes=st.sampled_from([0, 2000, 1 << 26]), data=st.data())
    @example(text="", block=1, table_bytes=0, data=None)
    @example(text=" ", block=1, table_bytes=0, data=None)
    @example(text="a ", block=1, table_bytes=0, data=None)
    @example(text="\u2581", block=9, table_bytes=0, data=None)
    @example(text="   a  b\u2581 \u2581c   ", block=3, table_bytes=0, data=None)
    def same(text: str, block: int, table_bytes: int, data: st.DataObject | None) -> None:
        monkeypatch.setattr(word_ids, "BLOCK", block)
        monkeypatch.setattr(word_ids, "TABLE_BYTES", table_bytes)
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4))) if data else []
        parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert by_words(words, parts) == processor.encode(text)

    same()


@pytest.mark.parametrize("name", sorted(NOT_CUT))
def test_a_model_that_cannot_be_cut_exactly_encodes_whole_texts(
    models: dict[str, bytes], corpus_text: str, name: str
) -> None:
    assert load_word_ids(models[name]) is None
    tokenizer = TextTokenizer(name, models[name], 1, 2)
    wanted = by_sentencepiece(models[name], corpus_text)
    assert tokenizer.encode(corpus_text).tolist() == wanted
    parts = [corpus_text[:1000], corpus_text[1000:]]
    assert np.concatenate(list(tokenizer.encode_parts(parts))).tolist() == wanted


@pytest.mark.parametrize("name", MODELS)
def test_a_novel_has_the_same_ids_in_every_model(models: dict[str, bytes], corpus_text: str, name: str) -> None:
    tokenizer = TextTokenizer(name, models[name], 1, 2)
    assert tokenizer.encode(corpus_text).tolist() == by_sentencepiece(models[name], corpus_text)


@pytest.mark.parametrize(
    "novel", [path for path in NOVELS if path.stat().st_size < 400_000], ids=lambda path: path.stem
)
def test_a_whole_novel_has_the_same_ids(demo_tokenizer: TextTokenizer, novel: Path) -> None:
    text = novel.read_text(encoding="utf-8")
    assert demo_tokenizer.encode(text).tolist() == by_sentencepiece(demo_tokenizer.model_bytes, text)


@given(text=HOSTILE)
def test_the_demos_tokenizer_is_exact_on_hostile_text(demo_tokenizer: TextTokenizer, text: str) -> None:
    wanted = by_sentencepiece(demo_tokenizer.model_bytes, text)
    words = load_word_ids(demo_tokenizer.model_bytes)
    assert words is not None
    assert by_words(words, [text]) == wanted and demo_tokenizer.encode(text).tolist() == wanted
    long = text * (SHORT_TEXT // max(1, len(text)) + 1)
    assert demo_tokenizer.encode(long).tolist() == by_sentencepiece(demo_tokenizer.model_bytes, long)


@pytest.mark.parametrize("seed", range(4))
def test_words_that_never_come_again_leave_no_memory_behind(
    demo_tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(word_ids, "TABLE_BYTES", 1 << 16)
    monkeypatch.setattr(word_ids, "BLOCK", 1 << 10)
    rng = np.random.default_rng(seed)
    text = " ".join("".join(map(chr, rng.integers(97, 123, 8))) for _ in range(4000)) + "ab" * 5000
    words = load_word_ids(demo_tokenizer.model_bytes)
    assert words is not None
    assert by_words(words, [text]) == by_sentencepiece(demo_tokenizer.model_bytes, text)
    assert len(words._row_of) < 1000 and len(words._table) == len(words._row_of)


def test_what_encode_returns_may_be_written_to(demo_tokenizer: TextTokenizer, corpus_text: str) -> None:
    for text in (corpus_text[:50], corpus_text):
        ids = demo_tokenizer.encode(text)
        ids += 1
        assert ids.dtype == np.int32 and (ids - 1).tolist() == demo_tokenizer.encode(text).tolist()


def test_a_tokenizer_goes_to_a_worker_without_its_table(demo_tokenizer: TextTokenizer, corpus_text: str) -> None:
    ids = demo_tokenizer.encode(corpus_text)
    sent = pickle.dumps(demo_tokenizer)
    assert len(sent) < len(demo_tokenizer.model_bytes) + 1000
    assert pickle.loads(sent).encode(corpus_text).tolist() == ids.tolist()


@pytest.mark.parametrize("text", ["\ud800", "a" * 5000 + "\udfff"])
def test_half_of_a_surrogate_pair_is_refused(demo_tokenizer: TextTokenizer, text: str) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        demo_tokenizer.encode(text)
