"""Every schedule, on 1 to 8 devices and in every order, against dense float64 attention written out in numpy."""

from collections.abc import Callable, Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh

from lwm_train.attention import attention, token_order
from tests.lwm_train.attention.dense import dense, packed_ids

ROWS, LENGTH, HEADS, KEY_HEADS, HEAD_DIM = 2, 656, 4, 2, 8  # tiles each: 2 on 8 devices, 3 uneven ones on 4
ORDERS = ("contiguous", "zigzag", "striped", "dealt", "auto", "shuffled")


def permutations(order: str, segment: np.ndarray, num_devices: int) -> np.ndarray:
    if order == "shuffled":
        return np.stack([np.random.default_rng(i).permutation(len(row)) for i, row in enumerate(segment)])
    return np.stack([token_order(order, row, num_devices, tile=64) for row in segment])


def arrays(seed: int, *, heads: int = HEADS, key_heads: int = KEY_HEADS, length: int = LENGTH) -> list[np.ndarray]:
    """q, k, v, d_out in float64."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(ROWS, length, n, HEAD_DIM)) for n in (heads, key_heads, key_heads, heads)]


def make_mesh(**sizes: int) -> Mesh:
    shape = tuple(sizes.get(axis, 1) for axis in ("dp", "fsdp", "tp", "sp"))
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, ("dp", "fsdp", "tp", "sp"), axis_types=(AxisType.Auto,) * 4, devices=devices)


@cache
def compiled(schedule: str, mesh: Mesh | None) -> Callable[..., tuple[jax.Array, ...]]:
    @jax.jit
    def run(q, k, v, segment, position, d_out):  # type: ignore[no-untyped-def]
        def out_of(q, k, v):  # type: ignore[no-untyped-def]
            return attention(q, k, v, segment, position, mesh=mesh, schedule=schedule)

        out, pull_back = jax.vjp(out_of, q, k, v)
        return out, *pull_back(d_out)

    return run


def assert_equals_dense(
    arrays: list[np.ndarray],
    segment: np.ndarray,
    position: np.ndarray,
    *,
    mesh: Mesh | None,
    orders: Sequence[str] = ("contiguous",),
    schedule: str = "ring",
    tolerance: float = 1e-9,
) -> None:
    q, k, v, d_out = arrays
    wanted = dense(q, k, v, segment, position, d_out)
    for order in orders:
        perm = permutations(order, segment, mesh.shape["sp"] if mesh else 1)
        at = np.arange(len(perm))[:, None], perm
        with jax.enable_x64(True):
            got = compiled(schedule, mesh)(*(x[at] for x in (q, k, v, segment, position, d_out)))
        for name, mine, theirs in zip(("out", "dq", "dk", "dv"), got, wanted, strict=True):
            assert mine.dtype == jnp.float64
            error = np.abs(np.asarray(mine) - theirs[at]).max() / max(np.abs(theirs).max(), 1e-30)
            assert error < tolerance, f"{name}, {order}: {error:.1e}"
            assert np.all(np.asarray(mine)[segment[at] == 0] == 0), f"{name}: padding is not exactly 0"


@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
def test_ring_equals_dense_attention_in_every_order(num_devices: int) -> None:
    mesh = make_mesh(sp=num_devices)
    segment, position = packed_ids([[170, 1, 43, 2, 280, 73], [5, 34, 3, 390, 166]], LENGTH)
    assert_equals_dense(arrays(0), segment, position, mesh=mesh, orders=ORDERS)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([[LENGTH], [LENGTH]], id="one segment as long as the row"),
        pytest.param([[], [LENGTH]], id="one row of padding"),
        pytest.param([[], []], id="nothing but padding"),
        pytest.param([[1] * LENGTH, [3] * 100], id="tiny segments"),
        pytest.param([[7], [LENGTH - 1]], id="almost nothing, almost all"),
    ],
)
def test_rows_at_the_edges_equal_dense_attention(rows: list[list[int]]) -> None:
    segment, position = packed_ids(rows, LENGTH)
    assert_equals_dense(arrays(1), segment, position, mesh=make_mesh(sp=4), orders=("contiguous", "dealt"))


@settings(max_examples=8, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 60) | st.integers(1, LENGTH), max_size=30), min_size=ROWS, max_size=ROWS),
    order=st.sampled_from(ORDERS),
    num_devices=st.sampled_from([2, 4, 8]),
    seed=st.integers(0, 2**31),
)
def test_random_packed_rows_equal_dense_attention(
    rows: list[list[int]], order: str, num_devices: int, seed: int
) -> None:
    segment, position = packed_ids(rows, LENGTH)
    assert_equals_dense(arrays(seed), segment, position, mesh=make_mesh(sp=num_devices), orders=(order,))


@pytest.mark.parametrize("schedule", ["allgather", "ulysses"])
def test_other_schedules_equal_dense_attention(schedule: str) -> None:
    segment, position = packed_ids([[170, 1, 43, 2, 280, 73], [5, 34, 3, 390, 166]], LENGTH)
    mesh = make_mesh(sp=2, dp=2)
    assert_equals_dense(arrays(0), segment, position, mesh=mesh, schedule=schedule, orders=("contiguous", "dealt"))


@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (4, 1)])
def test_grouped_heads_and_odd_lengths_equal_dense_attention(heads: int, key_heads: int) -> None:
    length = 2 * 173
    segment, position = packed_ids([[173, 40], [99, 246]], length)
    inputs = arrays(2, heads=heads, key_heads=key_heads, length=length)
    assert_equals_dense(inputs, segment, position, mesh=make_mesh(sp=2))


def test_rows_and_heads_can_be_split_too() -> None:
    segment, position = packed_ids([[170, 330], [20, 30, 560]], LENGTH)
    for mesh in (make_mesh(fsdp=2, tp=2, sp=2), None):
        assert_equals_dense(arrays(3), segment, position, mesh=mesh)


def test_bfloat16_stays_within_its_own_error() -> None:
    segment, position = packed_ids([[170, 1, 43, 2, 280, 73], [5, 34, 3, 390, 166]], LENGTH)
    exact = arrays(4)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in exact]
    q, k, v, d_out = (np.asarray(x, np.float64) for x in rounded)
    wanted = dense(q, k, v, segment, position, d_out)
    got = compiled("ring", make_mesh(sp=4))(*rounded[:3], segment, position, rounded[3])
    for name, mine, theirs in zip(("out", "dq", "dk", "dv"), got, wanted, strict=True):
        assert mine.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(mine, np.float64) - theirs) / np.linalg.norm(theirs)
        assert error < 2.0**-7, f"{name}: {error:.1e}"


def test_works_under_scan_and_checkpoint_as_the_model_calls_it() -> None:
    mesh = make_mesh(sp=4)
    segment, position = (jnp.asarray(x) for x in packed_ids([[170, 330], [20, 30, 560]], LENGTH))
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in arrays(5))

    def layers(q: jax.Array, remat: bool) -> jax.Array:
        def layer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return x + attention(x, k, v, segment, position, mesh=mesh), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer) if remat else layer, q, length=2)[0] ** 2)

    plain, again = (jax.jit(jax.grad(partial(layers, remat=remat)))(q) for remat in (False, True))
    assert np.array_equal(plain, again)


def test_huge_scores_neither_overflow_nor_give_nan() -> None:
    segment, position = packed_ids([[170, 330], []], LENGTH)
    q, k, v, d_out = arrays(6)
    assert_equals_dense([q * 30, k * 30, v, d_out], segment, position, mesh=make_mesh(sp=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "rnig"}, "schedule: got 'rnig', wanted one of"),
        ({"kernel": "fast"}, "kernel: got 'fast', wanted auto or one of"),
        ({"mesh": 8, "length": 12}, "12 tokens in a row cannot be split over sp = 8"),
        ({"heads": 3}, "3 query heads are not a multiple of 2 key heads"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(change: dict[str, object], message: str) -> None:
    length, heads = int(str(change.get("length", 16))), int(str(change.get("heads", 4)))
    q, k = jnp.zeros((1, length, heads, 8)), jnp.zeros((1, length, 2, 8))
    ids = jnp.ones((1, length), jnp.int32)
    mesh = make_mesh(sp=8) if "mesh" in change else None
    options = {name: str(change[name]) for name in ("schedule", "kernel") if name in change}
    with pytest.raises(ValueError, match=message):
        attention(q, k, k, ids, ids, mesh=mesh, **options)
