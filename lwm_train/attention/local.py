"""Attention of one device to keys it already holds: a block kernel with its own derivative.

    q, k, v, ids -> kernel.forward -> out, lse      saved: q, k, v, ids, out, lse
    d_out -> kernel.backward -> dq, dk, dv          (scores are computed again)

Used when there is one device, and by the schedules that first bring everything together (all-gather, all-to-all).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lwm_train.attention.block import ATTENTION_RESULT, BlockKernel, TokenIds, accumulation_dtype


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_local(
    kernel: BlockKernel,
    q_BKGQD: jax.Array,
    k_BKSD: jax.Array,
    v_BKSD: jax.Array,
    q_ids: TokenIds,
    k_ids: TokenIds,
) -> jax.Array:
    """out [B, K, G, Q, D] in q's dtype; names follow `block.py`."""
    return _forward(kernel, q_BKGQD, k_BKSD, v_BKSD, q_ids, k_ids)[0]


def _forward(
    kernel: BlockKernel, q: jax.Array, k: jax.Array, v: jax.Array, q_ids: TokenIds, k_ids: TokenIds
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    out, lse = kernel.forward(q, k, v, q_ids, k_ids)
    out, lse = checkpoint_name((out.astype(q.dtype), lse), ATTENTION_RESULT)
    return out, (q, k, v, *q_ids, *k_ids, out, lse)


def _backward(
    kernel: BlockKernel, saved: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    q, k, v, q_segment, q_position, k_segment, k_position, out, lse = saved
    dtype = accumulation_dtype(q.dtype)
    delta = jnp.sum(out.astype(dtype) * d_out.astype(dtype), axis=-1)
    q_ids, k_ids = TokenIds(q_segment, q_position), TokenIds(k_segment, k_position)
    dq, dk, dv = kernel.backward(q, k, v, q_ids, k_ids, d_out, lse, delta)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


attend_local.defvjp(_forward, _backward)
