"""The contract between a schedule (who meets whom, when) and a block kernel (how one meeting is computed).

A schedule cuts the row into blocks, moves key blocks about, and calls a block kernel for each pair of blocks:

    queries  q_BKGQD  -+
    keys     k_BKSD   -+-> forward  -> out_BKGQD, lse_BKGQ      both in the accumulation dtype
    values   v_BKSD   -+
    the same, d_out, lse, delta -> backward -> dq, dk, dv       all in the accumulation dtype

Legend: B rows, K key heads, G query heads for each key head, Q queries, S keys, D head size, L tokens.

`lse` is the logarithm of the sum of exponentials of a query's scores. A query that sees no key in the block has
out = 0 and lse = DEAD_LSE, which vanishes in every merge and never gives a NaN.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

ATTENTION_RESULT = "attention_result"
"""What `jax.checkpoint` policies call the two results that a custom VJP keeps: out and lse."""

DEAD_LSE = -1.0e20
"""The log-sum-exp of no scores at all: finite, so that differences of two such values are 0 and not NaN."""


class TokenIds(NamedTuple):
    """What the mask needs to know of each token of a block; both int32 [B, L]; segment 0 is padding."""

    segment_BL: jax.Array
    position_BL: jax.Array


class BlockKernel(Protocol):
    """Attention of one block of queries to one block of keys, forward and backward.

    A kernel is a hashable value: schedules take it as a static argument.
    """

    def tile(self, length: int) -> int:
        """The size of the tiles that a block of `length` tokens is cut into, for the ring to ask which are live."""
        ...

    def forward(
        self, q_BKGQD: jax.Array, k_BKSD: jax.Array, v_BKSD: jax.Array, q_ids: TokenIds, k_ids: TokenIds
    ) -> tuple[jax.Array, jax.Array]:
        """Return out [B, K, G, Q, D] and lse [B, K, G, Q] in the accumulation dtype."""
        ...

    def backward(
        self,
        q_BKGQD: jax.Array,
        k_BKSD: jax.Array,
        v_BKSD: jax.Array,
        q_ids: TokenIds,
        k_ids: TokenIds,
        d_out_BKGQD: jax.Array,
        lse_BKGQ: jax.Array,
        delta_BKGQ: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return this block's share of dq, dk, dv; `lse` is of the whole row, `delta` is sum(out * d_out) over D."""
        ...


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Sums are kept in float32, or in float64 when the inputs are float64."""
    return jnp.dtype(jnp.float64) if dtype == jnp.float64 else jnp.dtype(jnp.float32)


def merge(out_a: jax.Array, lse_a: jax.Array, out_b: jax.Array, lse_b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Join the attention of the same queries to two disjoint sets of keys. out [..., D], lse [...]."""
    lse = jnp.logaddexp(lse_a, lse_b)
    return out_a * jnp.exp(lse_a - lse)[..., None] + out_b * jnp.exp(lse_b - lse)[..., None], lse
