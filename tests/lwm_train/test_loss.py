"""The chunked loss against whole logits and automatic differentiation, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwm_train import loss as loss_module
from lwm_train.batch import Batch
from lwm_train.config import MeshSpec, Shares
from lwm_train.loss import loss_and_sums, weight_totals
from lwm_train.mesh import make_mesh

ROWS, LENGTH, DIM, TEXT, VISION = 4, 36, 8, 12, 20


@pytest.fixture(autouse=True)
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(loss_module, "CHUNK", 25)  # several chunks, the last one short
    with jax.enable_x64(True):
        yield


def made(seed: int, vision: bool = True) -> tuple[Any, Any, Any, Batch]:
    rng = np.random.default_rng(seed)
    is_vision = rng.random((ROWS, LENGTH)) < (0.4 if vision else 0)
    weights = np.where(rng.random((ROWS, LENGTH)) < 0.6, rng.random((ROWS, LENGTH)), 0).astype(np.float32)
    targets = np.where(is_vision, rng.integers(0, VISION, is_vision.shape), rng.integers(0, TEXT, is_vision.shape))
    zeros = np.zeros(is_vision.shape, np.int32)
    batch = Batch(zeros, zeros > 0, zeros, zeros, targets.astype(np.int32), is_vision, weights)
    return rng.normal(size=(ROWS, LENGTH, DIM)), rng.normal(size=(DIM, TEXT)), rng.normal(size=(DIM, VISION)), batch


def whole_logits(
    hidden: Any, text_head: Any, vision_head: Any, batch: Batch, shares: Shares | None, z_loss: float = 0
) -> Any:
    """The same loss with all logits at once, for automatic differentiation."""
    weights = jnp.asarray(batch.target_weights, jnp.float64)
    parts, totals = [], []
    for head, mask in ((text_head, ~batch.target_vision), (vision_head, batch.target_vision)):
        log_p = jax.nn.log_softmax(hidden @ head)
        targets = jnp.where(mask, batch.targets, 0)
        ce = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        ce += z_loss * jnp.log(jnp.exp(hidden @ head).sum(-1)) ** 2
        parts.append(jnp.sum(weights * mask * ce))
        totals.append(jnp.sum(weights * mask))
    if shares is None:
        return (parts[0] + parts[1]) / (totals[0] + totals[1])
    given = [shares.text if totals[0] > 0 else 0, shares.vision if totals[1] > 0 else 0]
    return sum(s / sum(given) * p / t for s, p, t in zip(given, parts, totals, strict=True) if t > 0)


@pytest.mark.parametrize("shares", [None, Shares(text=0.5, vision=0.5), Shares(text=0.9, vision=0.1)])
@pytest.mark.parametrize("vision", [True, False])
def test_loss_and_gradients_equal_those_of_whole_logits(shares: Shares | None, vision: bool) -> None:
    hidden, text_head, vision_head, batch = made(0, vision)

    def ours(*args: Any) -> Any:
        return loss_and_sums(*args, batch, shares)[0]

    got = jax.value_and_grad(ours, argnums=(0, 1, 2))(hidden, text_head, vision_head)
    wanted = jax.value_and_grad(whole_logits, argnums=(0, 1, 2))(hidden, text_head, vision_head, batch, shares)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("shares", [None, Shares(text=0.9, vision=0.1)])
@pytest.mark.parametrize("spec", [None, MeshSpec(tp=4)])
def test_z_loss_is_exact_and_not_in_the_reported_sums(shares: Shares | None, spec: MeshSpec | None) -> None:
    hidden, text_head, vision_head, batch = made(5)
    mesh = None if spec is None else make_mesh(spec)

    def ours(*args: Any) -> Any:
        return loss_and_sums(*args, batch, shares, mesh, z_loss=0.03)

    got = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2), has_aux=True))(hidden, text_head, vision_head)
    wanted = jax.value_and_grad(whole_logits, argnums=(0, 1, 2))(hidden, text_head, vision_head, batch, shares, 0.03)
    (loss, sums), gradients = got
    for a, b in zip(jax.tree.leaves((loss, gradients)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)
    without = loss_and_sums(hidden, text_head, vision_head, batch, shares)[1]
    for a, b in zip(jax.tree.leaves(sums), jax.tree.leaves(without), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_losses_and_sums_of_parts_add_up_to_those_of_the_whole() -> None:
    hidden, text_head, vision_head, batch = made(6)
    shares = Shares(text=0.7, vision=0.3)
    whole = loss_and_sums(hidden, text_head, vision_head, batch, shares, z_loss=0.03)
    total = weight_totals(batch, jnp.float64)
    parts = [
        loss_and_sums(
            hidden[rows], text_head, vision_head, Batch(**{key: a[rows] for key, a in vars(batch).items()}), shares,
            z_loss=0.03, of_total=total,
        )
        for rows in (slice(0, 1), slice(1, 4))
    ]  # fmt: skip
    for a, b in zip(jax.tree.leaves(jax.tree.map(jnp.add, *parts)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_memory_beside_the_gradients_is_flat_in_the_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK", 512)
    dim, vocabulary = 32, 8000

    def temp(length: int) -> int:
        def of(shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype)

        row = of((1, length), jnp.int32)
        mask = of((1, length), jnp.bool_)
        batch: Any = Batch(row, mask, row, row, row, mask, of((1, length)))  # type: ignore[arg-type]
        arrays = of((1, length, dim)), of((dim, vocabulary)), of((dim, 20)), batch
        compiled = jax.jit(jax.grad(lambda *a: loss_and_sums(*a)[0], argnums=(0, 1, 2))).lower(*arrays).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    few, many = temp(2048), temp(65_536)
    logits = 65_536 * vocabulary * 4
    assert many < logits / 50
    assert many - few < 4 * (65_536 - 2048) * dim * 4  # hidden and its gradient, as the loop carries them


@pytest.mark.parametrize("spec", [MeshSpec(tp=4), MeshSpec(sp=4), MeshSpec(dp=2, tp=2, sp=2)])
def test_loss_sums_and_gradients_are_the_same_on_every_mesh(spec: MeshSpec) -> None:
    hidden, text_head, vision_head, batch = made(1)

    def of(mesh: Any) -> Any:
        step = jax.jit(
            jax.value_and_grad(
                lambda *args: loss_and_sums(*args, batch, Shares(text=0.5, vision=0.5), mesh),
                argnums=(0, 1, 2),
                has_aux=True,
            )
        )
        return jax.tree.leaves(step(hidden, text_head, vision_head))

    for a, b in zip(of(make_mesh(spec)), of(None), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


def test_sums_count_every_trained_token_once_by_modality() -> None:
    hidden, text_head, vision_head, batch = made(2)
    sums = loss_and_sums(hidden, text_head, vision_head, batch)[1]
    trained = batch.target_weights > 0
    assert sums.num_trained.tolist() == [
        (trained & ~batch.target_vision).sum(),
        (trained & batch.target_vision).sum(),
    ]
    likeliest = np.where(batch.target_vision, np.argmax(hidden @ vision_head, -1), np.argmax(hidden @ text_head, -1))
    right = (likeliest == batch.targets) & trained
    assert sums.num_correct.tolist() == [(right & ~batch.target_vision).sum(), (right & batch.target_vision).sum()]


def test_a_batch_without_a_trained_token_has_loss_and_gradients_zero() -> None:
    hidden, text_head, vision_head, batch = made(3)
    nothing = Batch(**{**vars(batch), "target_weights": np.zeros_like(batch.target_weights)})
    loss, grads = jax.value_and_grad(lambda *a: loss_and_sums(*a, nothing)[0], argnums=(0, 1, 2))(
        hidden, text_head, vision_head
    )
    assert float(loss) == 0
    assert all(not np.asarray(g).any() for g in grads)


def test_logits_far_from_zero_do_not_overflow() -> None:
    hidden, text_head, vision_head, batch = made(4)
    loss, grads = jax.value_and_grad(lambda *a: loss_and_sums(*a, batch)[0])(1e4 * hidden, text_head, vision_head)
    assert np.isfinite(float(loss)) and np.isfinite(np.asarray(grads)).all()
