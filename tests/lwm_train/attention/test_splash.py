"""The TPU kernel: exact in interpret mode for every order, alone and in a ring, and it lowers for TPU from here."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from lwm_train.attention import attention, token_order
from lwm_train.attention.block import TokenIds
from lwm_train.attention.splash import SplashKernel
from tests.lwm_train.attention.dense import dense, packed_ids

ROWS, LENGTH, HEADS, KEY_HEADS, HEAD_DIM = 2, 296, 4, 2, 8  # three tiles, the last not full
SEGMENT, POSITION = packed_ids([[130, 1, 77, 30], [5, 61, 3, 227]], LENGTH)


def shuffled(row: np.ndarray) -> np.ndarray:
    return np.random.default_rng(len(row)).permutation(len(row))


def assert_equals_dense(mesh: Mesh | None, orders: list[str], dtype: jnp.dtype, tolerance: float) -> None:
    rng = np.random.default_rng(0)
    shapes = [(ROWS, LENGTH, heads, HEAD_DIM) for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)]
    q, k, v, d_out = (np.asarray(jnp.asarray(rng.normal(size=shape), dtype), np.float64) for shape in shapes)
    wanted = dense(q, k, v, SEGMENT, POSITION, d_out)

    @jax.jit
    def run(q, k, v, segment, position, d_out):  # type: ignore[no-untyped-def]
        def out_of(q, k, v):  # type: ignore[no-untyped-def]
            return attention(q, k, v, segment, position, mesh=mesh, schedule="ring", kernel="splash")

        out, pull_back = jax.vjp(out_of, q, k, v)
        return out, *pull_back(d_out)

    for order in orders:
        deal = shuffled if order == "shuffled" else partial(token_order, order, num_devices=2)
        at = np.arange(ROWS)[:, None], np.stack([deal(row) for row in SEGMENT])
        got = run(
            *(jnp.asarray(x[at], dtype) for x in (q, k, v)), SEGMENT[at], POSITION[at], jnp.asarray(d_out[at], dtype)
        )
        for name, mine, theirs in zip(("out", "dq", "dk", "dv"), got, wanted, strict=True):
            assert mine.dtype == dtype
            error = np.linalg.norm(np.asarray(mine, np.float64) - theirs[at]) / np.linalg.norm(theirs)
            assert error < tolerance, f"{name}, {order}: {error:.1e}"
            assert np.all(np.asarray(mine)[SEGMENT[at] == 0] == 0), f"{name}: padding is not exactly 0"


def test_splash_equals_dense_attention_in_every_order() -> None:
    assert_equals_dense(None, ["contiguous", "striped", "dealt", "shuffled"], jnp.dtype(jnp.float32), 1e-6)


def test_a_ring_of_splash_in_bfloat16_stays_within_its_own_error() -> None:
    mesh = jax.make_mesh(
        (1, 1, 1, 2), ("dp", "fsdp", "tp", "sp"), axis_types=(AxisType.Auto,) * 4, devices=jax.devices()[:2]
    )
    assert_equals_dense(mesh, ["contiguous", "zigzag"], jnp.dtype(jnp.bfloat16), 2.0**-7)


def test_splash_lowers_for_tpu_on_a_machine_without_one() -> None:
    x = jax.ShapeDtypeStruct((1, 2, 2, 256, 128), jnp.bfloat16)
    keys = jax.ShapeDtypeStruct((1, 2, 256, 128), jnp.bfloat16)
    ids = TokenIds(*(jax.ShapeDtypeStruct((1, 256), jnp.int32) for _ in range(2)))
    sums = jax.ShapeDtypeStruct((1, 2, 2, 256), jnp.float32)
    kernel = SplashKernel()
    forward = jax.export.export(jax.jit(kernel.forward), platforms=["tpu"])(x, keys, keys, ids, ids)
    backward = jax.export.export(jax.jit(kernel.backward), platforms=["tpu"])(x, keys, keys, ids, ids, x, sums, sums)
    assert forward.mlir_module().count("tpu_custom_call") == 1
    assert backward.mlir_module().count("tpu_custom_call") == 2


def test_tables_of_a_long_block_stay_small() -> None:
    kernel = SplashKernel()
    assert [kernel.tile(length) for length in (100, 16384, 16385, 1 << 20)] == [128, 128, 256, 8192]


def test_float64_is_refused() -> None:
    with jax.enable_x64(True), pytest.raises(ValueError, match="splash takes bfloat16 and float32, got float64"):
        x, ids = jnp.zeros((1, 8, 2, 8)), jnp.ones((1, 8), jnp.int32)
        attention(x, x, x, ids, ids, mesh=None, kernel="splash")
