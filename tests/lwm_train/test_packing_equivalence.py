"""The paper's masked sequence packing: a packed batch is the same training step as its examples padded, one per row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from lwm_train.attention.order import token_order
from lwm_train.batch import Batch, make_batch, put_on_mesh
from lwm_train.config import MeshSpec, ModelConfig, Shares
from lwm_train.loss import loss_and_sums
from lwm_train.mesh import make_mesh
from lwm_train.model import Params, forward, init_params
from tests.lwm_train.rows import one_per_row, packed_rows, random_examples

ROW, ROWS, EXAMPLES = 64, 4, 8
CONFIG = ModelConfig(16, 24, 2, 4, 2, text_vocab_size=60, dtype="float64", rope_theta=100.0)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def loss_fn(shares: Shares | None, mesh: Any) -> Callable[[Params, Batch], jax.Array]:
    def loss(params: Params, batch: Batch) -> jax.Array:
        hidden = forward(params, CONFIG, batch.tokens, batch.vision_mask, batch.segment_ids, batch.position_ids, mesh)
        return loss_and_sums(hidden, params.text_head, params.vision_head, batch, shares, mesh)[0]

    return loss


@cache
def compiled(shares: Shares | None, sp: int) -> tuple[Callable[[Params, Batch], Any], Any]:
    mesh = None if sp == 0 else make_mesh(MeshSpec(sp=sp))
    return jax.jit(jax.value_and_grad(loss_fn(shares, mesh))), mesh


def relative_error(got: Any, wanted: Any) -> float:
    """Of whole gradients: the largest difference over the largest value, leaf by leaf."""
    return max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max() / max(np.abs(np.asarray(b)).max(), 1e-12))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    )


@pytest.mark.parametrize("shares", [None, Shares(text=0.5, vision=0.5)], ids=["no-shares", "half-and-half"])
@pytest.mark.parametrize("weighting", ["example", "token"])
def test_packed_rows_have_the_loss_and_gradients_of_the_same_examples_one_per_row(
    weighting: Any, shares: Shares | None
) -> None:
    params = init_params(CONFIG, jax.random.key(0))
    step, _ = compiled(shares, 0)
    for seed in range(5):
        examples = random_examples(np.random.default_rng(seed), EXAMPLES, 24, 60)
        packed = step(params, make_batch(packed_rows(examples, ROW, ROWS, weighting)))
        padded = step(params, make_batch(one_per_row(examples, ROW, weighting)))
        assert relative_error(packed, padded) < 1e-9


@pytest.mark.parametrize("order", ["contiguous", "zigzag", "dealt"])
def test_packed_rows_on_a_ring_have_the_loss_and_gradients_of_the_same_examples_one_per_row(order: str) -> None:
    params = init_params(CONFIG, jax.random.key(1))
    reference, _ = compiled(None, 0)
    step, mesh = compiled(None, 4)
    for seed in range(3):
        examples = random_examples(np.random.default_rng(100 + seed), EXAMPLES, 24, 60)
        rows = packed_rows(examples, ROW, ROWS, "example")
        orders = [token_order(order, row["segment_ids"], 4) for row in rows]
        packed = step(params, put_on_mesh(make_batch(rows, orders), mesh))
        padded = reference(params, make_batch(one_per_row(examples, ROW, "example")))
        assert relative_error(packed, padded) < 1e-9


def test_under_example_weighting_the_loss_is_the_mean_over_examples_of_each_examples_mean_loss() -> None:
    params = init_params(CONFIG, jax.random.key(2))
    step, _ = compiled(None, 0)
    examples = random_examples(np.random.default_rng(7), EXAMPLES, 24, 60)
    packed, _ = step(params, make_batch(packed_rows(examples, ROW, ROWS, "example")))
    alone = [float(step(params, make_batch(one_per_row([e], ROW, "token")))[0]) for e in examples]
    np.testing.assert_allclose(float(packed), np.mean(alone), rtol=1e-7)  # weights are float32


def test_naive_packing_gives_another_loss() -> None:
    """The ablation's other arm: attention over borders and plain cuts must not be equal by accident."""
    from lwm_data.format.packed import Piece, pack_row

    params = init_params(CONFIG, jax.random.key(3))
    step, _ = compiled(None, 0)
    examples = random_examples(np.random.default_rng(8), EXAMPLES, 24, 60)
    masked = packed_rows(examples, ROW, ROWS, "token")
    naive, row, used = [], [], 0
    for e in examples:
        if used + e.num_tokens > ROW:
            naive.append(pack_row(row, ROW, "naive", "token").arrays())
            row, used = [], 0
        row.append(Piece(e, 0, e.num_tokens))
        used += e.num_tokens
    naive.append(pack_row(row, ROW, "naive", "token").arrays())
    naive += [pack_row([], ROW, "naive", "token").arrays()] * (ROWS - len(naive))
    assert abs(float(step(params, make_batch(masked))[0]) - float(step(params, make_batch(naive))[0])) > 1e-4
