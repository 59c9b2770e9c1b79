"""The MLP in chunks against the formula, and what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwm_train.config import MeshSpec
from lwm_train.mesh import make_mesh
from lwm_train.mlp import swiglu

DIM, FFN = 8, 24


@pytest.fixture
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def formula(h: Any, w1: Any, w3: Any, w2: Any) -> Any:
    gate = h @ w1
    return (gate / (1 + jnp.exp(-gate)) * (h @ w3)) @ w2


@pytest.mark.parametrize(
    ("chunk", "spec"),
    [(7, None), (64, None), (None, None), (7, MeshSpec(dp=2, sp=2)), (3, MeshSpec(fsdp=2, tp=2, sp=2))],
    ids=["chunks-and-a-rest", "one-chunk", "whole", "rows-and-tokens-spread", "all-spread"],
)
@pytest.mark.usefixtures("float64")
def test_result_and_gradients_are_those_of_the_formula(chunk: int | None, spec: MeshSpec | None) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape) for shape in [(4, 36, DIM), (DIM, FFN), (DIM, FFN), (FFN, DIM)]]
    d_out = rng.normal(size=(4, 36, DIM))
    mesh = None if spec is None else make_mesh(spec)

    def of(mlp: Any) -> Any:
        def both(*arrays: Any) -> Any:
            out, pull = jax.vjp(mlp, *arrays)
            return out, pull(d_out)

        return jax.tree.leaves(jax.jit(both)(*arrays))

    for a, b in zip(of(lambda *given: swiglu(*given, chunk, mesh)), of(formula), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def test_weight_gradients_of_many_chunks_are_summed_in_float32() -> None:
    """In bfloat16 a sum of 256 like addends stops growing long before its end."""
    rng = np.random.default_rng(1)
    h, w1, w3, w2 = (
        jnp.asarray(np.abs(rng.normal(size=shape)), jnp.bfloat16)
        for shape in [(1, 512, DIM), (DIM, FFN), (DIM, FFN), (FFN, DIM)]
    )

    def d_w2(h: Any, chunk: int | None) -> Any:
        return jax.grad(lambda w: swiglu(h, w1, w3, w, chunk, None).astype(jnp.float32).sum())(w2)

    exact = np.asarray(
        jax.grad(lambda w: formula(*(x.astype(jnp.float32) for x in (h, w1, w3, w))).sum())(w2), np.float32
    )
    chunked = np.asarray(d_w2(h, 2), np.float32)
    assert (np.abs(chunked - exact) / np.abs(exact)).max() < 0.02


def test_what_exists_at_a_time_does_not_grow_with_the_row() -> None:
    """Beside h, the result and their gradients, [L, D] each, there is one chunk of [C, F], forward and backward."""
    dim, ffn, chunk = 64, 1024, 256

    def temp(length: int) -> int:
        shapes = [(1, length, dim), (dim, ffn), (dim, ffn), (ffn, dim)]
        grad = jax.grad(lambda *a: (swiglu(*a, chunk, None) ** 2).sum(), argnums=(0, 1, 2, 3))
        lowered = jax.jit(grad).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
        return int(lowered.compile().memory_analysis().temp_size_in_bytes)

    grows_by = (temp(4096) - temp(2048)) / 2048  # bytes a token
    assert grows_by < 5 * dim * 4 < ffn * 4
