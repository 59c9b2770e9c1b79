"""The source `qa`: which windows of books are read, which questions follow, and the ids that come of it."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from lwm_data.format.vocab import TextTokenizer
from lwm_data.manifest_sources import Qa, Span, Split
from lwm_data.qa.chunks import Chunker
from lwm_data.sources.files import InputFile, find_files, hash_file
from lwm_data.sources.heldout import is_heldout
from lwm_data.sources.qa import asked_of
from lwm_data.sources.qa_windows import TOO_FEW, Evidence, depth_of, plan_windows
from lwm_data.sources.record import Record, Rejection
from lwm_data.sources.token_starts import encode_with_starts
from lwm_data.sources.unit import Unit, group_input, plan_units, read_unit

FRAME = 9


def _rule(**keys: Any) -> Qa:
    return Qa.model_validate(
        {"name": "qa", "type": "qa", "path": "qa.jsonl", "books": "*.txt", "max_trained": 1} | keys
    )


@st.composite
def _books(draw: st.DrawFn) -> tuple[np.ndarray, list[Evidence]]:
    """Borders and pairs, each about one chunk or, as another tokenizer's chunks do, ending a token after a border."""
    sizes = draw(st.lists(st.integers(1, 60), min_size=1, max_size=25))
    borders = np.cumsum([0, *sizes])
    pairs = []
    for number in draw(st.lists(st.integers(0, len(sizes) - 1), max_size=30)):
        chunks = draw(st.integers(1, 3))  # more than one: pairs of another cutting, whose evidence overlaps
        stop = min(int(borders[min(number + chunks, len(sizes))]) + draw(st.integers(0, 1)), int(borders[-1]))
        num_trained = draw(st.integers(1, 8))
        pairs.append(Evidence(int(borders[number]), stop, num_trained + draw(st.integers(1, 12)), num_trained))
    return borders, pairs


RULES = st.builds(
    lambda low, more, order, questions, most, depth: _rule(
        tokens={"min": low, "max": low + more},
        order=order,
        questions=questions,
        max_trained=most,
        depth="as-is" if order == "interleaved" else depth,
    ),
    st.integers(10, 300),
    st.integers(0, 100),
    st.sampled_from(["random", "reading", "interleaved"]),
    st.none() | st.builds(lambda low, more: {"min": low, "max": low + more}, st.integers(1, 3), st.integers(0, 3)),
    st.sampled_from([0.02, 0.1, 1]),
    st.sampled_from(["as-is", "uniform"]),
)


@given(book=_books(), rule=RULES, seed=st.integers(0, 5))
def test_every_pair_is_asked_once_after_its_evidence_in_a_window_of_bounded_tokens(
    book: tuple[np.ndarray, list[Evidence]], rule: Qa, seed: int
) -> None:
    borders, pairs = book
    windows, left = plan_windows(borders, pairs, rule, FRAME, Random(seed))
    asked = Counter(number for window in windows for number, _ in window.asked)
    assert set(asked) | set(left) == set(range(len(pairs))) and not set(asked) & set(left)
    assert all(count == 1 for count in asked.values())
    for window in windows:
        of = [pairs[number] for number, _ in window.asked]
        places = [place for _, place in window.asked]
        assert {window.start, window.stop, *places} <= set(borders.tolist()) and window.start < window.stop
        assert all(window.start <= pair.start and pair.stop <= window.stop for pair in of)
        num_tokens = FRAME + window.stop - window.start + sum(pair.num_tokens for pair in of)
        assert num_tokens <= rule.tokens.max
        assert sum(pair.num_trained for pair in of) <= rule.max_trained * num_tokens
        if rule.questions:
            assert rule.questions.min <= len(of) <= rule.questions.max
        if rule.order == "interleaved":
            assert places == sorted(places) and places[-1] == window.stop
            assert all(pair.stop <= place for pair, place in zip(of, places, strict=True))
            assert not any(pair.start < place < pair.stop for pair in of for place in places)
        else:
            assert set(places) == {window.stop}
        if rule.order == "reading":
            assert [pair.start for pair in of] == sorted(pair.start for pair in of)
    assert plan_windows(borders, pairs, rule, FRAME, Random(seed)) == (windows, left)


@given(book=_books(), rule=RULES, seed=st.integers(0, 5))
def test_a_pair_is_left_only_where_no_window_could_ask_it(
    book: tuple[np.ndarray, list[Evidence]], rule: Qa, seed: int
) -> None:
    borders, pairs = book
    for number, reason in plan_windows(borders, pairs, rule, FRAME, Random(seed))[1].items():
        pair = pairs[number]
        fitting = [
            size
            for start in borders[borders <= pair.start].tolist()
            for stop in borders[borders >= pair.stop].tolist()
            if (size := FRAME + stop - start + pair.num_tokens) <= rule.tokens.max
            and pair.num_trained <= rule.max_trained * size
        ]
        assert (reason == TOO_FEW) == bool(fitting)
        assert reason != TOO_FEW or (rule.questions and rule.questions.min > 1)


@pytest.mark.parametrize("where", [(0.0, 1.0), (0.4, 0.6), (0.7, 0.8)])
def test_uniform_depths_are_uniform_wherever_the_pairs_are(where: tuple[float, float]) -> None:
    rng = Random(0)
    borders = np.cumsum([0] + [rng.randint(600, 1000) for _ in range(400)])
    numbers = [i for i in range(400) if where[0] <= i / 400 < where[1]]
    pairs = [Evidence(int(borders[i]), int(borders[i + 1]), 40, 14) for i in numbers for _ in range(2)]
    rule = _rule(tokens=32768, depth="uniform", max_trained=0.01)
    windows, left = plan_windows(borders, pairs, rule, FRAME, rng)
    depths = [depth_of(window, pairs[number], place) for window in windows for number, place in window.asked]
    counts = np.histogram(depths, 10, (0, 1))[0]
    assert not left and counts.sum() == len(pairs)
    mean = len(pairs) / 10
    assert abs(counts - mean).max() <= max(4, 0.25 * mean), counts


class _Corpus:
    """Books in a folder, and pairs about their chunks, cut by the real chunker; an answer stands in its chunk."""

    def __init__(self, folder: Path, tokenizer: TextTokenizer, texts: dict[str, str], chunk_tokens: int = 200) -> None:
        (folder / "books").mkdir()
        self.folder, self.tokenizer, self.texts = folder, tokenizer, texts
        self.pairs: list[dict[str, Any]] = []
        self.other_lines: list[str] = []
        for name, text in texts.items():
            (folder / "books" / name).write_text(text, encoding="utf-8", newline="")
            for chunk in Chunker(tokenizer, chunk_tokens).cut(text):
                words = chunk.text.split()
                for number, at in enumerate(range(5, len(words) - 8, 60)):
                    question = f"What comes after {' '.join(words[at : at + 4])!r}?"
                    self.add(name, chunk.number, number, chunk.chars, question, " ".join(words[at + 4 : at + 8]))
                    self.pairs[-1]["tokens"] = list(chunk.tokens)

    def add(self, book: str, chunk: int, number: int, chars: Sequence[int], question: str, answer: str) -> None:
        raw = (self.folder / "books" / book).read_bytes()
        self.pairs.append(
            {
                "id": f"{book}:{chunk}:{number}",
                "question": question,
                "answer": answer,
                "book": book,
                "book_sha256": hashlib.sha256(raw).hexdigest(),
                "chunk": chunk,
                "chars": list(chars),
                "chunk_sha256": hashlib.sha256(self.texts[book][chars[0] : chars[1]].encode()).hexdigest(),
            }
        )

    def units(self, **keys: Any) -> list[Unit]:
        path = self.folder / "qa.jsonl"
        path.write_text("".join(line + "\n" for line in [*map(json.dumps, self.pairs), *self.other_lines]))
        source = _rule(path=str(path), books=str(self.folder / "books" / "*.txt"), **keys)
        groups = group_input(source, find_files(source.path, "path"))
        hashed: list[tuple[InputFile, ...]] = [tuple(hash_file(None, file) for file in group) for group in groups]
        return plan_units(source, hashed, 0, self.tokenizer, None)

    def read(self, **keys: Any) -> tuple[list[Record], list[Rejection]]:
        found = [item for unit in self.units(**keys) for item in read_unit(unit, self.tokenizer, None)]  # type: ignore[arg-type]
        return [x for x in found if isinstance(x, Record)], [x for x in found if isinstance(x, Rejection)]


@pytest.fixture
def corpus(tmp_path: Path, demo_tokenizer: TextTokenizer, corpus_text: str) -> _Corpus:
    texts = {"a.txt": corpus_text[:9000], "b é.txt": corpus_text[9000:14000], "c.txt": corpus_text[14000:30000]}
    return _Corpus(tmp_path, demo_tokenizer, texts)


def _reference(corpus: _Corpus, key: str) -> tuple[list[int], list[bool]]:
    """Ids and trained flags of an example whose questions stand at its end, from its key, the books and the pairs."""
    encode = corpus.tokenizer.encode
    ids = [corpus.tokenizer.bos, *encode("You are a helpful assistant. USER:").tolist()]
    words = key.split(" #")[0].split(" ")
    num_asked = sum("@" in word for word in words)
    book_at: list[str] = []  # of each token, the book that it is of
    for stretch in " ".join(words[: len(words) - num_asked]).split("+"):
        name, _, span = stretch.rpartition(":")
        start, stop = map(int, span.split("-"))
        book_at += [name] * (stop - start)
        ids += encode(corpus.texts[name]).tolist()[start:stop]
    trained = [False] * len(ids)
    for i, word in enumerate(words[len(words) - num_asked :]):
        label, _, place = word.partition("@")
        evidence = int(place.partition(":")[2].partition("-")[0])
        chunk, number = label.split(".")
        name = book_at[evidence - 1 - len(encode("You are a helpful assistant. USER:"))]
        (pair,) = (pair for pair in corpus.pairs if pair["id"] == f"{name}:{chunk}:{number}")
        asks = encode("USER:").tolist() * bool(i) + encode(f"{pair['question']} ASSISTANT:").tolist()
        says = [*encode(pair["answer"]).tolist(), corpus.tokenizer.eos]
        ids += asks + says
        trained += [False] * len(asks) + [True] * len(says)
    return ids, trained


@pytest.mark.parametrize("join", [1, 2])
@pytest.mark.parametrize("order", ["random", "reading"])
@pytest.mark.parametrize("depth", ["as-is", "uniform"])
def test_an_example_is_bos_a_slice_of_books_and_their_questions(
    corpus: _Corpus, join: int, order: str, depth: str
) -> None:
    records, rejected = corpus.read(tokens={"min": 900, "max": 2500}, join=join, order=order, depth=depth, repeat=2)
    assert rejected == [] and len({record.key for record in records}) == len(records)
    asked = 0
    for record in records:
        ids, trained = _reference(corpus, record.key)
        assert [int(token) for run in record.runs for token in run.tokens] == ids
        assert [run.trained for run in record.runs for _ in run.tokens] == trained
        assert len(ids) <= 2500
        asked += len(asked_of(record.key))
    assert asked == 2 * len(corpus.pairs)


@pytest.mark.parametrize("order", ["random", "interleaved"])
def test_a_key_says_where_the_evidence_stands_in_the_example(corpus: _Corpus, order: str) -> None:
    records, rejected = corpus.read(tokens=2000, order=order)
    assert rejected == []
    by_question = {pair["question"]: pair for pair in corpus.pairs}
    answered = []
    for record in records:
        ids = np.concatenate([run.tokens for run in record.runs])
        trained = np.concatenate([[run.trained] * len(run.tokens) for run in record.runs])
        ends = np.flatnonzero(trained & (ids == corpus.tokenizer.eos)).tolist()
        begins = np.flatnonzero(np.diff(trained.astype(int)) == 1) + 1
        assert len(ends) == len(begins) == len(asked_of(record.key))
        before = 0
        for asked, begin, end in zip(asked_of(record.key), begins.tolist(), ends, strict=True):
            prompt = corpus.tokenizer.decode(ids[before:begin])
            question = prompt[prompt.rindex("What comes after") :].removesuffix(" ASSISTANT:")
            pair = by_question[question.strip()]
            answered.append(pair["id"])
            assert corpus.tokenizer.decode(ids[begin:end]) == pair["answer"]
            own = corpus.tokenizer.encode(corpus.texts[pair["book"]])[slice(*pair["tokens"])]
            np.testing.assert_array_equal(ids[asked.start : asked.stop], own)
            assert asked.stop <= begin, "never asked before its evidence"
            before = end + 1
    assert sorted(answered) == sorted(by_question[question]["id"] for question in by_question)


@given(data=st.data())
def test_evidence_is_whole_wherever_another_tokenizer_cut_it(
    tmp_path_factory: pytest.TempPathFactory, demo_tokenizer: TextTokenizer, corpus_text: str, data: st.DataObject
) -> None:
    text = data.draw(st.sampled_from([corpus_text[:1500], "Ægir “quoted” 東京の\n\n" * 60]))
    corpus = _Corpus(tmp_path_factory.mktemp("qa"), demo_tokenizer, {"a.txt": text}, 10**6)
    corpus.pairs = []
    for number in range(data.draw(st.integers(1, 5))):
        start = data.draw(st.integers(0, len(text) - 1))
        stop = data.draw(st.integers(start + 1, min(len(text), start + 300)))
        corpus.add("a.txt", number, 0, (start, stop), f"Which is {number}?", f"It is {number}.")
    records, rejected = corpus.read(tokens=1200)
    found = {}
    for record in records:
        ids = np.concatenate([run.tokens for run in record.runs])
        for asked in asked_of(record.key):
            found[asked.pair] = corpus.tokenizer.decode(ids[asked.start : asked.stop])
    assert rejected == [] and len(found) == len(corpus.pairs)
    for pair in corpus.pairs:
        assert text[slice(*pair["chars"])].strip() in found[f"{pair['chunk']}.0"]


@given(text=st.text(st.sampled_from("ab ,.'’é東\U0001f600\u2581\n\t\x00"), min_size=1, max_size=60))
@example("\u2581")
@example("  a")
def test_tokens_begin_where_sentencepiece_says(demo_tokenizer: TextTokenizer, text: str) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=demo_tokenizer.model_bytes)
    found = processor.encode(text, return_type="offset_mapping")
    ids, starts = encode_with_starts(text, demo_tokenizer)
    assert (ids.tolist(), starts.tolist()) == (found["ids"], [begin for begin, _ in found["offsets"]])


def test_evidence_is_whole_where_a_tokenizer_changes_its_text(tmp_path: Path, corpus_text: str) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus_text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc_cf",
        minloglevel=2,
    )
    tokenizer = TextTokenizer("folding", model.getvalue(), 1, 2)
    corpus = _Corpus(tmp_path, tokenizer, {"a.txt": "The Queen ﬁxed  it. " + corpus_text[:5000]}, 150)
    records, rejected = corpus.read(tokens=1000)
    assert rejected == [] and sum(len(asked_of(record.key)) for record in records) == len(corpus.pairs)
    for record in records:
        ids, _ = _reference(corpus, record.key)
        assert [int(token) for run in record.runs for token in run.tokens] == ids
        for asked in asked_of(record.key):
            (pair,) = (pair for pair in corpus.pairs if pair["id"] == f"a.txt:{asked.pair.replace('.', ':')}")
            chunk = corpus.texts["a.txt"][slice(*pair["chars"])].replace("ﬁ", "fi").lower()
            evidence = tokenizer.decode(np.array(ids[asked.start : asked.stop]))
            assert " ".join(chunk.split()) in " ".join(evidence.split())


def test_what_is_no_usable_pair_is_rejected_with_its_reason(corpus: _Corpus) -> None:
    whole = len(corpus.pairs)
    good, last = corpus.pairs[0], corpus.pairs[-1]
    corpus.pairs += [
        good | {"id": "1", "book_sha256": "0" * 64},
        good | {"id": "2", "chars": [good["chars"][0], good["chars"][1] - 1]},
        good | {"id": "3", "book": "z.txt"},
        good | {"id": "4", "answer": " "},
        good | {"id": "5", "chars": [5, 5]},
        good | {"id": "6", "chunk": True},
        good | {"id": "7", "chunk_sha256": "f"},
        good | {"id": "8", "question": "\ud800?"},
        good | {"id": "9", "answer": "word " * 3000},
        good | {"id": "10", "chars": [2**39, 2**39 + 1], "chunk_sha256": hashlib.sha256(b"").hexdigest()},
        last | {"id": "11", "book": "c.txt", "chars": [last["chars"][0], last["chars"][1] + 1000]},
        good,
    ]
    corpus.other_lines = ["{", "[1]"]
    records, rejected = corpus.read(tokens=2000)
    assert {(of.key, of.reason) for of in rejected} == {
        ("1", "other book"),
        ("2", "other chunk"),
        ("3", "no such book"),
        *((str(i), "broken pair") for i in range(4, 9)),
        ("9", "filtered: too long"),
        ("10", "other chunk"),
        ("11", "other chunk"),
        (good["id"], "pair given twice"),
        (f"qa.jsonl:{whole + 13}", "not JSON"),
        (f"qa.jsonl:{whole + 14}", "not an object"),
    }
    assert sum(len(asked_of(record.key)) for record in records) == whole


def test_a_book_that_cannot_be_read_takes_its_pairs_along(corpus: _Corpus) -> None:
    (corpus.folder / "books" / "a.txt").write_bytes(b"caf\xe9")
    records, rejected = corpus.read(tokens=2000)
    reasons = Counter(of.reason for of in rejected)
    of_book = sum(pair["book"] == "a.txt" for pair in corpus.pairs)
    assert reasons == {"not UTF-8": 1, "unreadable book": of_book, "filtered: no pairs": 1}
    assert sum(len(asked_of(record.key)) for record in records) == len(corpus.pairs) - of_book


def test_a_split_leaves_out_the_books_that_it_leaves_out_of_books(corpus: _Corpus) -> None:
    both: set[str] = set()
    for take in ("train", "heldout"):
        split = Split.model_validate({"heldout": 0.5, "take": take, "seed": 1})
        records, rejected = corpus.read(tokens=2000, split=split)
        books = {book for book in corpus.texts if is_heldout(split, book) == (take == "heldout")}
        assert {record.key.partition(".txt:")[0] + ".txt" for record in records} == books
        assert {of.key for of in rejected if of.reason == "filtered: split"} == set(corpus.texts) - books
        both |= books
        assert 0 < len(books) < 3
    assert both == set(corpus.texts)


def test_a_unit_depends_on_its_own_books_pairs_alone(corpus: _Corpus) -> None:
    before = [unit.fingerprint for unit in corpus.units(tokens=2000)]
    (changed,) = (pair for pair in corpus.pairs if pair["id"] == "c.txt:0:0")
    changed["answer"] = "nothing"
    after = [unit.fingerprint for unit in corpus.units(tokens=2000)]
    assert len(before) == 4 and before[:2] == after[:2] and before[2] != after[2]
    assert before[:2] == [unit.fingerprint for unit in corpus.units(tokens=2000, share=0.3, pack_with="own")][:2]
    assert before[0] != corpus.units(tokens=2001)[0].fingerprint


def test_max_trained_bounds_the_answers_of_each_example(corpus: _Corpus) -> None:
    records, _ = corpus.read(tokens=3000, max_trained=0.02)
    assert len(records) > 2
    for record in records:
        num_trained = sum(len(run.tokens) for run in record.runs if run.trained)
        assert num_trained <= 0.02 * sum(len(run.tokens) for run in record.runs)


def test_a_key_of_another_source_asks_nothing() -> None:
    assert asked_of("novel 1.0@5%:3-9 x.txt") == ()
    (asked,) = asked_of("a 9.9@9%:9-9.txt:0-50 1.0@5%:3-9 #2")
    assert (asked.pair, asked.depth, asked.start, asked.stop) == ("1.0", 0.05, 3, 9)


def test_interleaved_questions_have_no_depth_to_choose() -> None:
    with pytest.raises(ValueError, match="order random or reading"):
        _rule(tokens=Span(min=1, max=2), order="interleaved", depth="uniform")
