"""Attention of one new token to a cache of keys and values that is spread over `sp`.

    device 0: keys 0..3  -> out, lse  -+
    device 1: keys 4..7  -> out, lse  -+-> weights exp(lse - greatest lse), one sum over the devices -> out
    device 2: keys 8..11 -> out, lse  -+

Only [B, H, D] numbers travel, never keys. Slots of the cache that are not filled yet have segment 0.

Legend: B rows, L slots of the cache, H query heads, K key heads, G = H / K, D head size.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from lwm_train.attention.block import DEAD_LSE, TokenIds, accumulation_dtype
from lwm_train.attention.mask import visible

_ROWS = ("dp", "fsdp")
_CACHE = PartitionSpec(_ROWS, "sp", "tp", None)


def decode_attention(
    q_BHD: jax.Array,
    k_BLKD: jax.Array,
    v_BLKD: jax.Array,
    segment_ids_BL: jax.Array,
    position_ids_BL: jax.Array,
    query_segment_B: jax.Array,
    query_position_B: jax.Array,
    *,
    mesh: Mesh | None,
) -> jax.Array:
    """One query per row against the cache, by the same rule as `attention`; out [B, H, D] in q's dtype.

    Rows are split over (dp, fsdp), heads over tp, the cache over sp; query and result are the same on all of sp.
    A query of segment 0, or one that sees no key, gives 0.

    Raises:
        ValueError: for heads that do not match.
    """
    if q_BHD.shape[1] % k_BLKD.shape[2]:
        raise ValueError(f"attention: {q_BHD.shape[1]} query heads are not a multiple of {k_BLKD.shape[2]} key heads")
    query = TokenIds(query_segment_B[:, None], query_position_B[:, None])
    cache = TokenIds(segment_ids_BL, position_ids_BL)
    if mesh is None:
        out, _ = _partial(q_BHD, k_BLKD, v_BLKD, cache, query)
        return out.astype(q_BHD.dtype)

    def on_each_device(q: jax.Array, k: jax.Array, v: jax.Array, cache: TokenIds, query: TokenIds) -> jax.Array:
        out_BHD, lse_BH = _partial(q, k, v, cache, query)
        weight_BH = jnp.exp(lse_BH - lax.pmax(lse_BH, "sp"))
        total_BH = lax.psum(weight_BH, "sp")
        return (lax.psum(out_BHD * weight_BH[..., None], "sp") / total_BH[..., None]).astype(q.dtype)

    heads, ids = PartitionSpec(_ROWS, "tp", None), PartitionSpec(_ROWS, "sp")
    specs = (heads, _CACHE, _CACHE, ids, PartitionSpec(_ROWS, None))
    sharded = jax.shard_map(on_each_device, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return sharded(q_BHD, k_BLKD, v_BLKD, cache, query)


def _partial(
    q_BHD: jax.Array, k_BLKD: jax.Array, v_BLKD: jax.Array, cache: TokenIds, query: TokenIds
) -> tuple[jax.Array, jax.Array]:
    """Attention to the slots at hand: out [B, H, D] and lse [B, H], in the accumulation dtype."""
    rows, num_heads, head_dim = q_BHD.shape
    dtype = accumulation_dtype(q_BHD.dtype)
    q_BKGD = q_BHD.reshape(rows, k_BLKD.shape[2], -1, head_dim)
    scores_BKGL = jnp.einsum("bkgd,blkd->bkgl", q_BKGD, k_BLKD, preferred_element_type=dtype) / math.sqrt(head_dim)
    seen_BKGL = visible(query, cache)[:, None]
    scores_BKGL = jnp.where(seen_BKGL, scores_BKGL, DEAD_LSE)
    peak_BKG = scores_BKGL.max(axis=-1)
    p_BKGL = jnp.where(seen_BKGL, jnp.exp(scores_BKGL - peak_BKG[..., None]), 0)
    total_BKG = p_BKGL.sum(axis=-1)
    seen_any = total_BKG > 0
    out_BKGD = jnp.einsum("bkgl,blkd->bkgd", p_BKGL.astype(v_BLKD.dtype), v_BLKD, preferred_element_type=dtype)
    out_BKGD = out_BKGD / jnp.where(seen_any, total_BKG, 1)[..., None]
    lse_BKG = jnp.where(seen_any, peak_BKG + jnp.log(jnp.where(seen_any, total_BKG, 1)), DEAD_LSE)
    return out_BKGD.reshape(rows, num_heads, head_dim), lse_BKG.reshape(rows, num_heads)
