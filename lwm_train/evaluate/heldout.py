"""The loss of a model on a dataset that it was not trained on.

rows     0 1 2 3 | 4 5 6 7 | 8 9 . .      the last batch is filled up with rows of padding: every row counts once
sums       ce, n     ce, n     ce, n      added up on the host in float64; loss = sum of ce / sum of n
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from lwm_data.format.dataset import Dataset
from lwm_data.format.packed import Arrays
from lwm_train.batch import make_batch, put_on_mesh
from lwm_train.config import ModelConfig
from lwm_train.model import Params
from lwm_train.step import make_eval_step


@dataclass(frozen=True)
class HeldoutLoss:
    """Mean cross-entropy in nats per trained token, each counted once, whatever its loss weight.

    text_loss, text_accuracy: of text tokens; accuracy is the share whose likeliest token is the right one.
    vision_loss, vision_accuracy: of vision codes; None where the dataset has none.
    num_text, num_vision: tokens that count.
    """

    text_loss: float
    text_accuracy: float
    num_text: int
    vision_loss: float | None
    vision_accuracy: float | None
    num_vision: int

    @property
    def text_perplexity(self) -> float:
        return math.exp(self.text_loss)


def heldout_loss(
    params: Params,
    config: ModelConfig,
    dataset: Dataset,
    mesh: Mesh,
    batch_rows: int,
    progress: Callable[[int], None] | None = None,
) -> HeldoutLoss:
    """The loss on all rows of `dataset`; `progress` is called after each batch with the number of its rows.

    ValueError where the dataset's vocabulary is not the model's, where it has no text to predict, or where the mesh
    does not divide its rows.
    """
    if dataset.info.text_vocab_size != config.text_vocab_size:
        raise ValueError(
            f"{dataset.url}: text ids 0 to {dataset.info.text_vocab_size - 1}, the model's are 0 to "
            f"{config.text_vocab_size - 1}; evaluate on a dataset built with the tokenizer of the training data"
        )
    row_shards = mesh.shape["dp"] * mesh.shape["fsdp"]
    if batch_rows % row_shards or dataset.info.row_length % mesh.shape["sp"]:
        raise ValueError(
            f"{dataset.url}: batches of {batch_rows} rows of {dataset.info.row_length:,} tokens do not divide over "
            f"dp x fsdp = {row_shards} and sp = {mesh.shape['sp']}; choose other batch_rows or another mesh"
        )
    eval_step = make_eval_step(config, mesh)
    empty = padding_row(dataset.info.row_length)
    totals = np.zeros((3, 2))  # ce, tokens, right ones; text, vision
    for start in range(0, len(dataset), batch_rows):
        rows = [dataset[row] for row in range(start, min(start + batch_rows, len(dataset)))]
        batch = make_batch([*rows, *[empty] * (batch_rows - len(rows))])
        sums = eval_step(params, put_on_mesh(batch, mesh))
        totals += np.array([sums.ce, sums.num_trained, sums.num_correct], np.float64)
        if progress is not None:
            progress(len(rows))
    ce, num, correct = totals.tolist()
    if not num[0]:
        raise ValueError(f"{dataset.url}: no text token of it is trained, so there is no loss to measure")
    return HeldoutLoss(
        text_loss=ce[0] / num[0],
        text_accuracy=correct[0] / num[0],
        num_text=int(num[0]),
        vision_loss=ce[1] / num[1] if num[1] else None,
        vision_accuracy=correct[1] / num[1] if num[1] else None,
        num_vision=int(num[1]),
    )


def padding_row(length: int) -> Arrays:
    """A row without a token."""
    return Arrays(
        tokens=np.zeros(length, np.int32),
        vision_mask=np.zeros(length, bool),
        segment_ids=np.zeros(length, np.int32),
        position_ids=np.zeros(length, np.int32),
        loss_weights=np.zeros(length, np.float32),
    )
