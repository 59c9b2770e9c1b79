"""Random packed rows for the trainer's tests."""

from __future__ import annotations

import numpy as np

from lwm_data.format.example import Example, Run
from lwm_data.format.packed import Arrays, LossWeighting, Piece, pack_row


def random_examples(rng: np.random.Generator, count: int, max_tokens: int, text_vocab: int) -> list[Example]:
    """Examples of 3 to max_tokens tokens: BOS, then 1 to 4 runs of text or vision, trained or not."""
    examples = []
    for number in range(count):
        runs = [Run(np.array([1], np.int32), is_vision=False, trained=False)]
        left = int(rng.integers(2, max_tokens))
        while left > 0 and len(runs) < 5:
            length = int(rng.integers(1, left + 1))
            vision = bool(rng.random() < 0.4)
            ids = rng.integers(0, 8194 if vision else text_vocab, length).astype(np.int32)
            runs.append(Run(ids, is_vision=vision, trained=bool(rng.random() < 0.7)))
            left -= length
        runs.append(Run(np.array([2], np.int32), is_vision=False, trained=True))
        examples.append(Example("made", str(number), 0, tuple(runs)))
    return examples


def packed_rows(examples: list[Example], row_length: int, num_rows: int, weighting: LossWeighting) -> list[Arrays]:
    """First fit into `num_rows` rows; an example that fits nowhere is an error."""
    rows: list[list[Piece]] = [[] for _ in range(num_rows)]
    for example in examples:
        row = next(r for r in rows if sum(p.stop for p in r) + example.num_tokens <= row_length)
        row.append(Piece(example, 0, example.num_tokens))
    return [pack_row(row, row_length, "masked", weighting).arrays() for row in rows]


def one_per_row(examples: list[Example], row_length: int, weighting: LossWeighting) -> list[Arrays]:
    """Each example alone in a padded row."""
    return [pack_row([Piece(e, 0, e.num_tokens)], row_length, "masked", weighting).arrays() for e in examples]
