"""One query against a cache spread over `sp` gives what it would give against the whole cache on one device."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from lwm_train.attention import decode_attention

ROWS, SLOTS, HEADS, KEY_HEADS, HEAD_DIM = 3, 40, 4, 2, 8


def expected(q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """[B, H, D], one query and one head at a time; `seen` is bool [B, slots]."""
    out = np.zeros_like(q)
    for row in range(ROWS):
        for head in range(HEADS):
            keys, values = k[row, seen[row], head // 2], v[row, seen[row], head // 2]
            if len(keys):
                weight = np.exp(keys @ q[row, head] / np.sqrt(HEAD_DIM))
                out[row, head] = weight @ values / weight.sum()
    return out


@pytest.mark.parametrize("num_devices", [0, 1, 2, 4, 8])
def test_decode_over_a_spread_cache_equals_dense_attention(num_devices: int) -> None:
    rng = np.random.default_rng(0)
    q = rng.normal(size=(ROWS, HEADS, HEAD_DIM))
    k, v = rng.normal(size=(2, ROWS, SLOTS, KEY_HEADS, HEAD_DIM))
    filled = np.array([3, 40, 17])  # with 8 devices most hold no filled slot of row 0
    segment = (np.arange(SLOTS) < filled[:, None]).astype(np.int32)
    position = np.tile(np.arange(SLOTS, dtype=np.int32), (ROWS, 1))
    query_segment, query_position = np.array([1, 1, 0], np.int32), np.array([2, 25, 16], np.int32)
    seen = (segment == 1) & (position <= query_position[:, None]) & (query_segment[:, None] == 1)
    axes, mesh = ("dp", "fsdp", "tp", "sp"), None
    if num_devices:
        devices = jax.devices()[:num_devices]
        mesh = jax.make_mesh((1, 1, 1, num_devices), axes, axis_types=(AxisType.Auto,) * 4, devices=devices)
    with jax.enable_x64(True):
        out = jax.jit(decode_attention, static_argnames="mesh")(
            q, k, v, segment, position, query_segment, query_position, mesh=mesh
        )
    np.testing.assert_allclose(out, expected(q, k, v, seen), rtol=1e-12, atol=1e-12)
    assert np.all(np.asarray(out)[2] == 0)  # a query of segment 0 sees nothing
