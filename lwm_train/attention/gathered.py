"""Two schedules for short rings: bring everything together in one step, then attend as one device does.

    all-gather   keys and values of all devices come to each: N blocks in memory, one collective, no steps to wait
                 in; gradients of keys and values go back by one reduce-scatter, summed in the accumulation dtype
    Ulysses      heads and tokens change places, and back: each device has the whole row for K / N key heads;
                 every device does the same work whatever the row looks like; K must be a multiple of N

            tokens ->  [ h0 h1 | h0 h1 ]   --all-to-all-->   [ h0 h0 | h1 h1 ]    and the results the other way
                        dev 0    dev 1                        dev 0    dev 1

`*_local` functions run inside `jax.shard_map`; names follow `block.py`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lwm_train.attention.block import ATTENTION_RESULT, BlockKernel, TokenIds, accumulation_dtype
from lwm_train.attention.local import attend_local

_TOKENS = 2  # the dim of the tokens in k_BKSD


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def allgather_local(
    kernel: BlockKernel, axis: str, q_BKGQD: jax.Array, k_BKSD: jax.Array, v_BKSD: jax.Array, ids: TokenIds
) -> jax.Array:
    """Attention of the local queries to the gathered keys of all devices; out [B, K, G, Q, D] in q's dtype."""
    return _allgather_forward(kernel, axis, q_BKGQD, k_BKSD, v_BKSD, ids)[0]


def _allgather_forward(
    kernel: BlockKernel, axis: str, q: jax.Array, k: jax.Array, v: jax.Array, ids: TokenIds
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    out, lse = kernel.forward(q, _gather(k, axis, _TOKENS), _gather(v, axis, _TOKENS), ids, _gather_ids(ids, axis))
    out, lse = checkpoint_name((out.astype(q.dtype), lse), ATTENTION_RESULT)
    return out, (q, k, v, *ids, out, lse)


def _allgather_backward(
    kernel: BlockKernel, axis: str, saved: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, segment, position, out, lse = saved
    ids = TokenIds(segment, position)
    dtype = accumulation_dtype(q.dtype)
    delta = jnp.sum(out.astype(dtype) * d_out.astype(dtype), axis=-1)
    keys, values = _gather(k, axis, _TOKENS), _gather(v, axis, _TOKENS)
    dq, dk, dv = kernel.backward(q, keys, values, ids, _gather_ids(ids, axis), d_out, lse, delta)
    dk, dv = (lax.psum_scatter(x, axis, scatter_dimension=_TOKENS, tiled=True) for x in (dk, dv))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


allgather_local.defvjp(_allgather_forward, _allgather_backward)


def ulysses_local(
    kernel: BlockKernel, axis: str, q_BKGQD: jax.Array, k_BKSD: jax.Array, v_BKSD: jax.Array, ids: TokenIds
) -> jax.Array:
    """Attention of all tokens for this device's share of the key heads; out [B, K, G, Q, D] in q's dtype."""
    q, k, v = _heads_apart(q_BKGQD, axis, 3), _heads_apart(k_BKSD, axis, 2), _heads_apart(v_BKSD, axis, 2)
    row_ids = _gather_ids(ids, axis)
    out = attend_local(kernel, q, k, v, row_ids, row_ids)
    return lax.all_to_all(out, axis, split_axis=3, concat_axis=1, tiled=True)


def _heads_apart(x: jax.Array, axis: str, tokens: int) -> jax.Array:
    """[B, K, ..., L / N, D] -> [B, K / N, ..., L, D]."""
    return lax.all_to_all(x, axis, split_axis=1, concat_axis=tokens, tiled=True)


def _gather(x: jax.Array, axis: str, dim: int) -> jax.Array:
    return lax.all_gather(x, axis, axis=dim, tiled=True)


def _gather_ids(ids: TokenIds, axis: str) -> TokenIds:
    return TokenIds(*(_gather(field, axis, 1) for field in ids))
