"""A check sum of every array of a train state, the same on every mesh.

    sum over elements of bits * (2 * place + 1), modulo 2^32        place: of the element in the whole array

Whole numbers wrap, so the order of adding does not matter and devices may add their own parts. One bit more or less
changes the sum, as its weight is odd. Orbax's files have check sums of their index alone: of an array that lost a
bit on a disk they give back another number without a word.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lwm_train.model import Params
from lwm_train.step import TrainState

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def state_sums(tree: TrainState | Params, prefix: str = "") -> dict[str, int]:
    """The sum of each array by its path in the train state; `prefix` is the path of `tree` itself."""
    sums = jax.device_get(_sums(tree))
    return {prefix + jax.tree_util.keystr(path): int(value) for path, value in jax.tree.leaves_with_path(sums)}


@jax.jit
def _sums(tree: Any) -> Any:
    return jax.tree.map(_sum, tree)


def _sum(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize])
    if bits.dtype.itemsize == 8:
        bits = bits ^ (bits >> 32)
    bits = bits.astype(jnp.uint32)
    weight = jnp.ones((), jnp.uint32)
    stride = 2
    for axis in reversed(range(x.ndim)):  # a counter per axis: whole places would not lie as the array lies
        weight = weight + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(bits * weight, dtype=jnp.uint32)
