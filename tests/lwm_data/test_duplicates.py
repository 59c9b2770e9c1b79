"""Duplicates among many small texts, against exact Jaccard similarities of their word sequences, computed by hand."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_data import duplicates
from lwm_data.duplicates import EXACT, find_duplicates
from lwm_data.folder import DiskFolder
from lwm_data.format.example import text_runs
from lwm_data.format.vocab import TextTokenizer
from lwm_data.sources.record import Record
from lwm_data.text_marks import Marking, MarkUnit, mark_unit
from lwm_data.token_store import write_store

NEAR = 0.8
MARGIN = 0.15  # four deviations of an estimate by 128 minima
VOCABULARY = [f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(500)]


def shingles(text: str) -> set[tuple[str, ...]]:
    """The reference: sets of words in a row, no hashes."""
    words = text.lower().split()
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def jaccard(one: str, other: str) -> float:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def found(
    folder: Path, tokenizer: TextTokenizer, units: Sequence[Sequence[str]], near: float | None = NEAR
) -> dict[int, tuple[int, float]]:
    """record -> (kept, similarity) of texts that lie in several store files."""
    shared = Marking(DiskFolder(folder), tokenizer, None)
    names = []
    for number, texts in enumerate(units):
        records = [
            Record(str(i), text_runs(tokenizer, [(tokenizer.encode(text), True)], eos=True))
            for i, text in enumerate(texts)
        ]
        write_store(folder / f"{number}.arrow", records)
        names.append(f"marks-{number}.arrow")
        mark_unit(shared, MarkUnit(f"{number}.arrow", names[-1], True, False))
    taken = [np.ones(len(texts), np.bool_) for texts in units]
    result = find_duplicates(DiskFolder(folder), names, taken, True, near)
    return {
        int(record): (int(kept), float(similarity))
        for record, kept, similarity in zip(result.records, result.kept, result.similarity, strict=True)
    }


def changed(words: list[str], share: float, rng: random.Random) -> list[str]:
    return [rng.choice(VOCABULARY) if rng.random() < share else word for word in words]


def corpus(rng: random.Random, num_families: int, num_words: int) -> list[str]:
    """Texts, and copies of each with few and many words changed, and whole ones; shuffled."""
    texts = []
    for _ in range(num_families):
        words = [rng.choice(VOCABULARY) for _ in range(num_words)]
        texts.append(" ".join(words))
        texts += [" ".join(changed(words, share, rng)) for share in (0.003, 0.01, 0.02, 0.05, 0.1, 0.3)]
        texts.append("  " + "\n".join(words) + " ")
    rng.shuffle(texts)
    return texts


def test_what_is_alike_is_found_and_what_is_not_stays(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    texts = corpus(random.Random(0), 30, 300)
    gone = found(tmp_path, demo_tokenizer, [texts[:100], texts[100:101], texts[101:]])
    kept = [i for i in range(len(texts)) if i not in gone]
    assert 30 <= len(kept) < len(texts)
    for record, (original, similarity) in gone.items():
        assert original < record and original in kept
        true = jaccard(texts[record], texts[original])
        assert true >= NEAR - MARGIN, (record, original)
        assert true == 1 if similarity == EXACT else abs(true - similarity) < MARGIN
    for i, record in enumerate(kept):
        for original in kept[:i]:
            assert jaccard(texts[record], texts[original]) < NEAR + MARGIN


def test_without_near_only_equal_texts_go(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    texts = corpus(random.Random(1), 10, 50)
    gone = found(tmp_path, demo_tokenizer, [texts], near=None)
    words = [text.split() for text in texts]
    assert gone == {i: (words.index(of), EXACT) for i, of in enumerate(words) if words.index(of) != i}


@given(cuts=st.lists(st.integers(0, 40), max_size=4), seed=st.integers(0, 1000))
def test_how_records_lie_in_files_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, demo_tokenizer: TextTokenizer, cuts: list[int], seed: int
) -> None:
    texts = corpus(random.Random(seed), 5, 60)
    borders = [0, *sorted(cuts), len(texts)]
    units = [texts[a:b] for a, b in itertools.pairwise(borders)]
    one = found(tmp_path_factory.mktemp("one"), demo_tokenizer, [texts])
    many = found(tmp_path_factory.mktemp("many"), demo_tokenizer, units)
    assert one == many and one


def test_in_a_chain_a_record_is_a_copy_only_of_one_that_is_kept(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    words = [f"w{i}" for i in range(1000)]
    chain = [" ".join(words[i * 100 : i * 100 + 500]) for i in range(5)]  # neighbours share 396 of 596, others less
    gone = found(tmp_path, demo_tokenizer, [chain], near=0.5)
    assert {record: kept for record, (kept, _) in gone.items()} == {1: 0, 3: 2}


def test_a_text_equal_to_a_near_duplicate_names_the_one_that_is_kept(
    tmp_path: Path, demo_tokenizer: TextTokenizer
) -> None:
    rng = random.Random(3)
    words = [rng.choice(VOCABULARY) for _ in range(400)]
    like = " ".join([*words[:-1], "other"])
    gone = found(tmp_path, demo_tokenizer, [[" ".join(words), like, like]])
    assert {record: kept for record, (kept, _) in gone.items()} == {1: 0, 2: 0}


def test_pages_of_one_template_are_compared_with_a_few_only_and_real_duplicates_found(
    tmp_path: Path, demo_tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(4)
    template = [rng.choice(VOCABULARY) for _ in range(75)]
    pages = [template + [rng.choice(VOCABULARY) for _ in range(15)] for _ in range(300)]
    texts = [" ".join(page) for page in pages] + [" ".join([*pages[i], "more"]) for i in range(0, 300, 30)]
    num_compared = []
    of = duplicates._Signatures.of

    def counted(self: duplicates._Signatures, records: np.ndarray) -> np.ndarray:
        num_compared.append(len(records))
        return of(self, records)

    monkeypatch.setattr(duplicates._Signatures, "of", counted)
    monkeypatch.setattr(duplicates, "CANDIDATES", 2)
    gone = found(tmp_path, demo_tokenizer, [texts])
    assert max(num_compared) <= 14 * 2, "14 bands at 0.8"
    assert all(300 + i in gone for i in range(10))
    few = sum(num_compared)
    num_compared.clear()
    monkeypatch.setattr(duplicates, "CANDIDATES", 10**6)
    found(tmp_path, demo_tokenizer, [texts])
    assert sum(num_compared) > 3 * few, "the pages do meet in common bands"


def test_short_texts_and_texts_without_words(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    gone = found(tmp_path, demo_tokenizer, [["Thank you!", "thank YOU", "...", "???", "Thanks", "..."]])
    assert gone == {1: (0, 1.0), 5: (2, EXACT)}


def test_no_record_gives_no_duplicates(tmp_path: Path, demo_tokenizer: TextTokenizer) -> None:
    assert found(tmp_path, demo_tokenizer, [[], []]) == {}
    assert found(tmp_path, demo_tokenizer, [["a b c d e f"]]) == {}
