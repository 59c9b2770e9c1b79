"""Evaluation texts: what is looked for, what is found, and what a user is told of wrong ones."""

from __future__ import annotations

import io
import json
import random
import unicodedata
from pathlib import Path
from typing import Literal

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from lwm_data import record_text
from lwm_data.evaluation_texts import (
    cleanings_of,
    evaluation_fingerprint,
    find_evaluation_files,
    read_evaluation_texts,
)
from lwm_data.folder import DiskFolder
from lwm_data.format.example import text_runs
from lwm_data.format.vocab import TextTokenizer
from lwm_data.manifest import Contamination
from lwm_data.manifest_sources import Clean, Text
from lwm_data.sources.clean import clean
from lwm_data.sources.record import Record
from lwm_data.text_marks import Marking, MarkUnit, mark_record

UNIT = MarkUnit("store.arrow", "marks.arrow", near=False, evaluation=True)


def search(
    folder: Path,
    tokenizer: TextTokenizer,
    text: str,
    words: int = 13,
    field: str | None = None,
    cleaned: Clean | None = None,
) -> tuple[int, str | None, str | None]:
    """(found, evaluation text, first n-gram) of `text`, of a source `cleaned`, against all files in `folder`."""
    rule = Contamination(texts=(f"{folder}/*",), words=words, field=field)
    source = Text(name="source", type="text", path="*.txt", clean=cleaned or Clean())
    texts = read_evaluation_texts(rule, find_evaluation_files(rule), tokenizer, cleanings_of([source]))
    text = clean(text, source.clean)[0]
    record = Record("key", text_runs(tokenizer, [(tokenizer.encode(text), True)], eos=True))
    marks = mark_record(Marking(DiskFolder(folder), tokenizer, texts), UNIT, record)
    return marks.found, marks.evaluation, marks.ngram


def words(start: int, stop: int) -> str:
    return " ".join(f"w{i}" for i in range(start, stop))


@given(evaluation=st.lists(st.sampled_from("abc"), min_size=8, max_size=60), text=st.lists(st.sampled_from("abc")))
def test_what_is_found_is_what_a_person_would_find(
    tmp_path_factory: pytest.TempPathFactory, demo_tokenizer: TextTokenizer, evaluation: list[str], text: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "eval.txt").write_text("  ".join(evaluation).upper())
    size = min(13, len(evaluation))
    wanted = [tuple(evaluation[i : i + size]) for i in range(len(evaluation) - size + 1)]
    places = [i for i in range(len(text) - size + 1) if tuple(text[i : i + size]) in wanted]
    found, name, ngram = search(folder, demo_tokenizer, ", ".join(text))
    assert found == len(places)
    assert name == ("eval.txt" if places else None)
    assert ngram == (" ".join(text[places[0] : places[0] + size]) if places else None)


def test_an_ngram_is_found_wherever_blocks_are_cut(
    tmp_path: Path, demo_tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "eval.txt").write_text(words(100, 120) + ". " + words(50, 58))
    (tmp_path / "short.txt").write_text(words(500, 509))
    text = words(0, 300) + " -- " + words(400, 600)
    whole = search(tmp_path, demo_tokenizer, text)
    assert whole == (8 + 1, "eval.txt", words(100, 113))
    for block_tokens in (1, 10, 100):
        monkeypatch.setattr(record_text, "BLOCK_TOKENS", block_tokens)
        monkeypatch.setattr(record_text, "BLOCK_CHARS", 1)
        assert search(tmp_path, demo_tokenizer, text) == whole


def test_a_text_of_fewer_words_is_looked_for_as_a_whole_and_one_of_very_few_not(
    tmp_path: Path, demo_tokenizer: TextTokenizer
) -> None:
    rows = [{"question": words(0, 8), "answer": "w1"}, {"question": words(100, 107), "answer": [words(200, 230), "x"]}]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert search(tmp_path, demo_tokenizer, "Q: " + words(0, 8) + "?") == (1, "qa.jsonl:1 question", words(0, 8))
    assert search(tmp_path, demo_tokenizer, words(0, 7))[0] == 0
    assert search(tmp_path, demo_tokenizer, words(90, 150))[0] == 0, "seven words are not looked for"
    assert search(tmp_path, demo_tokenizer, words(210, 223)) == (1, "qa.jsonl:2 answer", words(210, 223))
    assert search(tmp_path, demo_tokenizer, words(210, 222))[0] == 0


def test_a_field_may_be_named(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"passage": words(0, 20), "text": words(50, 70)}))
    assert search(tmp_path, demo_tokenizer, words(0, 90), field="passage")[:2] == (8, "a.jsonl:1 passage")


def test_chinese_has_words_too(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    (tmp_path / "a.txt").write_text("這是最好的時代，這是最壞的時代。", encoding="utf-8")
    assert search(tmp_path, demo_tokenizer, "他說這是最好的時代，這是最壞的時代。")[0] == 2


LIGATURES = "The \ufb01rst o\ufb03cer found \u00bd a \ufb02ag in the \ufb01eld, \u2460 of \uff14\uff12"
ACCENTS = "The caf\u00e9's se\u00f1or owed the \u00fcbermensch fifty z\u0142oty for a cr\u00e8me in Krak\u00f3w"


@pytest.mark.parametrize("form", ["nfc", "nfkc", None])
def test_text_is_found_whichever_form_its_source_is_cleaned_to(
    tmp_path: Path, demo_tokenizer: TextTokenizer, form: Literal["nfc", "nfkc"] | None
) -> None:
    (tmp_path / "a.txt").write_text(LIGATURES, encoding="utf-8")
    found = search(tmp_path, demo_tokenizer, f"He said: {LIGATURES}.", words=8, cleaned=Clean(unicode=form))
    assert found[0] > 0 and found[1] == "a.txt"
    plain = unicodedata.normalize("NFKC", LIGATURES)
    assert (search(tmp_path, demo_tokenizer, plain, words=8, cleaned=Clean(unicode=form))[0] > 0) == (form == "nfkc")


@pytest.mark.parametrize("text", [LIGATURES, ACCENTS, unicodedata.normalize("NFD", ACCENTS)])
@pytest.mark.parametrize("rule", ["nmt_nfkc", "nmt_nfkc_cf", "identity"])
def test_text_is_found_whatever_the_tokenizer_makes_of_it(tmp_path: Path, rule: str, text: str) -> None:
    """SentencePiece's own defaults: it normalises, and what it does not know becomes `<unk>`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["it was the best of times and the worst of them"] * 20),
        model_writer=model,
        vocab_size=40,
        model_type="bpe",
        normalization_rule_name=rule,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = TextTokenizer("small", model.getvalue(), 1, 2)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found = search(tmp_path, tokenizer, f"And it was the best: {text} and more of the times", words=8)
    assert found[0] > 0 and found[1] == "a.txt"
    assert search(tmp_path, tokenizer, "It was the best of times, it was the worst of them.", words=8)[0] == 0


def test_the_fingerprint_tells_tokenizers_and_forms_apart(demo_tokenizer: TextTokenizer) -> None:
    rule = Contamination(texts=("*.txt",))
    other = TextTokenizer("demo", demo_tokenizer.model_bytes, demo_tokenizer.bos, demo_tokenizer.eos + 1)
    ways = [(demo_tokenizer, [Clean()]), (other, [Clean()]), (demo_tokenizer, [Clean(), Clean(unicode="nfkc")])]
    assert len({evaluation_fingerprint(rule, [], *way) for way in ways}) == 3


def test_many_ngrams_are_found_and_no_others(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    rng = random.Random(0)
    text = [rng.choice("abcdefgh") for _ in range(20_000)]
    (tmp_path / "a.txt").write_text(" ".join(text[:10_000]))
    wanted = {tuple(text[i : i + 13]) for i in range(10_000 - 12)}
    num = sum(tuple(text[i : i + 13]) in wanted for i in range(5_000, len(text) - 12))
    assert search(tmp_path, demo_tokenizer, " ".join(text[5_000:]))[0] == num


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x", r"contamination.texts.0: got .*a\.csv; wanted \.txt or \.jsonl"),
        ("a.txt", "only four words here", r"a\.txt: no text in it has 8 words"),
        ("a.txt", " ", r"a\.txt: empty"),
        ("a.jsonl", "{]", r"a\.jsonl:1: not JSON"),
        ("a.jsonl", '{"prompt": "x"}', r"a\.jsonl:1: no text in question, answer, text; name the field"),
        ("a.jsonl", "[1]", r"a\.jsonl:1: no text in question, answer, text"),
    ],
)
def test_wrong_evaluation_texts_are_named(
    tmp_path: Path, demo_tokenizer: TextTokenizer, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        search(tmp_path, demo_tokenizer, "text")
