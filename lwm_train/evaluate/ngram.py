"""Unigram and bigram models of a dataset's text: what a trained model must beat.

    row            ^  a  b  C  D  $ | ^  e  F | .      ^ a b are a prompt: their loss weight is 0
    targets                 C  D  $         F          those of the model's text loss: text, loss weight above 0
    contexts                b  C  D         e          the token before, of the same segment; all of vision is one

    unigram   p1(w)     = (count(w) + 1/2) / (tokens + V / 2)
    bigram    p2(w | h) = (count(h w) + kinds(h) * p1(w)) / (count(h) + kinds(h))      Witten-Bell

kinds(h) is the number of different words seen after h; after a context never seen, p2 is p1. Memory holds one entry
per different pair and one buffer of pairs, whatever the dataset's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from lwm_data.format.dataset import Dataset

BUFFER = 1 << 22  # pairs that are counted at a time


@dataclass(frozen=True)
class NgramBaseline:
    """Counts of a dataset's text targets; V text ids, and context V stands for every vision code.

    counts: int64[V] of each target. pairs: int64[n], sorted: context * V + target, each once.
    pair_counts: int64[n]. context_counts, context_kinds: int64[V + 1], targets and different targets after each.
    """

    tokenizer_fingerprint: str
    counts: Int64[np.ndarray, " vocab"]
    pairs: Int64[np.ndarray, " pairs"]
    pair_counts: Int64[np.ndarray, " pairs"]
    context_counts: Int64[np.ndarray, " contexts"]
    context_kinds: Int64[np.ndarray, " contexts"]

    @classmethod
    def fit(cls, dataset: Dataset) -> NgramBaseline:
        """Count the text targets of `dataset`. ValueError where it has none."""
        vocab_size = dataset.info.text_vocab_size
        pairs, pair_counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        for codes in _buffers(dataset):
            new, new_counts = np.unique(codes, return_counts=True)
            pairs, where = np.unique(np.concatenate([pairs, new]), return_inverse=True)
            merged = np.zeros(len(pairs), np.int64)
            np.add.at(merged, where, np.concatenate([pair_counts, new_counts]))
            pair_counts = merged
        if not len(pairs):
            raise ValueError(f"{dataset.url}: no text token of it is trained; n-gram models have nothing to count")
        context, target = np.divmod(pairs, vocab_size)
        counts, context_counts = np.zeros(vocab_size, np.int64), np.zeros(vocab_size + 1, np.int64)
        np.add.at(counts, target, pair_counts)
        np.add.at(context_counts, context, pair_counts)
        kinds = np.bincount(context, minlength=vocab_size + 1).astype(np.int64)
        return cls(dataset.info.tokenizer_fingerprint, counts, pairs, pair_counts, context_counts, kinds)

    def loss(self, dataset: Dataset) -> tuple[float, float]:
        """Mean nats per text target of `dataset`, of the unigram and of the bigram model.

        ValueError where it was built with another tokenizer, or has no text target.
        """
        if dataset.info.tokenizer_fingerprint != self.tokenizer_fingerprint:
            raise ValueError(
                f"{dataset.url}: tokenizer {dataset.info.tokenizer_fingerprint[:12]}, the n-gram models were fitted "
                f"with {self.tokenizer_fingerprint[:12]}; build both datasets with one tokenizer"
            )
        totals = np.zeros(2)
        num_targets = 0
        for codes in _buffers(dataset):
            totals += [-np.log(p).sum() for p in self._probabilities(codes)]
            num_targets += len(codes)
        if not num_targets:
            raise ValueError(f"{dataset.url}: no text token of it is trained, so there is no loss to measure")
        unigram, bigram = (totals / num_targets).tolist()
        return unigram, bigram

    def _probabilities(self, codes: Int64[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
        context, target = np.divmod(codes, len(self.counts))
        unigram = (self.counts[target] + 0.5) / (self.counts.sum() + 0.5 * len(self.counts))
        at = np.minimum(np.searchsorted(self.pairs, codes), len(self.pairs) - 1)
        seen = np.where(self.pairs[at] == codes, self.pair_counts[at], 0)
        kinds = self.context_kinds[context]
        total = self.context_counts[context] + kinds
        bigram = np.where(total > 0, (seen + kinds * unigram) / np.maximum(total, 1), unigram)
        return unigram, bigram


def _buffers(dataset: Dataset) -> Iterator[Int64[np.ndarray, " n"]]:
    """context * V + target of all text targets, about BUFFER at a time."""
    held: list[np.ndarray] = []
    num_held = 0
    for row in range(len(dataset)):
        held.append(_row_pairs(dataset, row))
        num_held += len(held[-1])
        if num_held >= BUFFER or row == len(dataset) - 1:
            yield np.concatenate(held)
            held, num_held = [], 0


def _row_pairs(dataset: Dataset, row: int) -> Int64[np.ndarray, " n"]:
    arrays = dataset[row]
    vocab_size = dataset.info.text_vocab_size
    contexts = np.where(arrays["vision_mask"], vocab_size, arrays["tokens"])[:-1].astype(np.int64)
    targets = arrays["tokens"][1:]
    segments = arrays["segment_ids"]
    counts = (arrays["loss_weights"] > 0) & ~arrays["vision_mask"]
    assert not np.any(counts[1:] & (segments[1:] != segments[:-1])), "a segment's first token has no context"
    return (contexts * vocab_size + targets)[counts[1:]]
