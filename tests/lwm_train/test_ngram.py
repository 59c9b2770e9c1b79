"""The n-gram baselines against the same formulas written with dicts, one token at a time."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lwm_data.format.dataset import Dataset
from lwm_data.format.example import Run, text_runs, vision_runs
from lwm_data.format.vocab import TextTokenizer
from lwm_data.sources.record import Record
from lwm_train.evaluate import ngram
from lwm_train.evaluate.ngram import NgramBaseline

MakeDataset = Callable[..., Dataset]


def records_of(tokenizer: TextTokenizer, text: str, seed: int, num_records: int) -> list[Record]:
    """Chats of prompt and answer, some with an image before the answer."""
    rng = np.random.default_rng(seed)
    records = []
    for i in range(num_records):
        at = int(rng.integers(0, len(text) - 400))
        prompt, answer = tokenizer.encode(text[at : at + 60]), tokenizer.encode(text[at + 60 : at + 300])
        runs = text_runs(tokenizer, [(prompt, False), (answer, True)], eos=True)
        if i % 5 == 0:
            image = vision_runs(tokenizer, rng.integers(0, 8192, (1, 256), dtype=np.int32), trained=True)
            runs = (*runs[:2], *image, *runs[2:])
        records.append(Record(f"{i}", runs))
    return records


@pytest.fixture(scope="module")
def datasets(
    tmp_path_factory: pytest.TempPathFactory, demo_tokenizer: TextTokenizer, corpus_text: str, dataset_of: MakeDataset
) -> tuple[Dataset, Dataset]:
    folder = tmp_path_factory.mktemp("ngram")
    train = dataset_of(folder / "train", records_of(demo_tokenizer, corpus_text[:9000], 0, 30), 512)
    heldout = dataset_of(folder / "heldout", records_of(demo_tokenizer, corpus_text[9000:16000], 1, 10), 512)
    return train, heldout


def pairs_by_hand(dataset: Dataset) -> list[tuple[object, int]]:
    """(context, target) of every trained text token, read from the rows' runs."""
    pairs: list[tuple[object, int]] = []
    for row in range(len(dataset)):
        packed = dataset.packed(row)
        at = 0
        before: dict[int, object] = {}
        for (length, segment, vision), weight in zip(packed.runs.tolist(), packed.weights.tolist(), strict=True):
            for token in packed.tokens[at : at + length].tolist():
                if weight > 0 and not vision and segment in before:  # nothing predicts a segment's first token
                    pairs.append((before[segment], token))
                before[segment] = "an image" if vision else token
            at += length
    return pairs


def losses_by_hand(train: Dataset, heldout: Dataset) -> tuple[float, float]:
    pairs = pairs_by_hand(train)
    words = Counter(word for _, word in pairs)
    after: dict[object, Counter[int]] = defaultdict(Counter)
    for context, word in pairs:
        after[context][word] += 1
    vocab_size = train.info.text_vocab_size
    unigram_sum = bigram_sum = 0.0
    held = pairs_by_hand(heldout)
    for context, word in held:
        unigram = (words[word] + 0.5) / (len(pairs) + 0.5 * vocab_size)
        seen = after.get(context, Counter())
        kinds, total = len(seen), sum(seen.values())
        bigram = (seen[word] + kinds * unigram) / (total + kinds) if kinds else unigram
        unigram_sum -= math.log(unigram)
        bigram_sum -= math.log(bigram)
    return unigram_sum / len(held), bigram_sum / len(held)


@pytest.mark.parametrize("buffer", [1, 700, 1 << 22])
def test_losses_are_those_of_the_slow_formulas(
    datasets: tuple[Dataset, Dataset], buffer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ngram, "BUFFER", buffer)
    train, heldout = datasets
    baseline = NgramBaseline.fit(train)
    assert baseline.loss(heldout) == pytest.approx(losses_by_hand(train, heldout), rel=1e-12)
    assert baseline.loss(train) == pytest.approx(losses_by_hand(train, train), rel=1e-12)


def test_every_context_has_probabilities_that_sum_to_one(datasets: tuple[Dataset, Dataset]) -> None:
    baseline = NgramBaseline.fit(datasets[0])
    vocab_size = len(baseline.counts)
    contexts = [int(np.argmax(baseline.context_counts)), int(np.argmin(baseline.context_counts)), vocab_size]
    for context in contexts:
        unigram, bigram = baseline._probabilities(context * vocab_size + np.arange(vocab_size))
        assert unigram.sum() == pytest.approx(1, abs=1e-9)
        assert bigram.sum() == pytest.approx(1, abs=1e-9)


def test_a_bigram_model_knows_its_training_text_better_than_a_unigram_model(datasets: tuple[Dataset, Dataset]) -> None:
    unigram, bigram = NgramBaseline.fit(datasets[0]).loss(datasets[0])
    assert bigram < unigram < math.log(datasets[0].info.text_vocab_size)


def test_a_dataset_of_another_tokenizer_is_refused(datasets: tuple[Dataset, Dataset]) -> None:
    baseline = NgramBaseline.fit(datasets[0])
    other = Dataset("elsewhere", datasets[1].info.model_copy(update={"tokenizer_fingerprint": "f" * 64}))
    with pytest.raises(ValueError, match=r"elsewhere: tokenizer ffffffffffff.*build both datasets"):
        baseline.loss(other)


def test_a_dataset_without_trained_text_is_refused(
    tmp_path: Path, demo_tokenizer: TextTokenizer, dataset_of: MakeDataset
) -> None:
    runs = (Run(demo_tokenizer.encode("only a prompt"), is_vision=False, trained=False),)
    dataset = dataset_of(tmp_path, [Record("0", runs)], 64, weighting="token")
    with pytest.raises(ValueError, match="no text token"):
        NgramBaseline.fit(dataset)
