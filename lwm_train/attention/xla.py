"""The block kernel that runs on any device: flash attention in plain XLA, tile by tile, dead tiles left out.

    queries, in tiles    keys, in tiles             Only live pairs of tiles are walked. For each tile of
      i=0                j=0                        queries the live tiles of keys are put in a list; the
      i=1                j=0 1                      inner loop runs over that list, so its trip count is
      i=2                    1 2                    the number of live tiles and a dead tile costs nothing.
      i=3                        3                  (Shapes stay static: only the trip count is data.)

Scores exist for one pair of tiles at a time, for all heads of one row. The backward pass computes them again
from the log-sum-exp. Neither loop is differentiated: schedules call `backward` from their own custom VJP.

Legend: B rows, K key heads, G query heads for each key head, Q queries, S keys, D head size, I and J tiles.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from lwm_train.attention.block import DEAD_LSE, TokenIds, accumulation_dtype
from lwm_train.attention.mask import live_tiles, pad_ids, tile_ranges, visible

_MASKED = -1.0e30  # below DEAD_LSE, so that exp(_MASKED - DEAD_LSE) is 0


@dataclass(frozen=True)
class XlaKernel:
    """The `BlockKernel` of this module, with the greatest tile that suits a platform.

    128 tokens are the side of a matrix unit, and of the chunks that `token_order` deals. On CPU 64 are better: the
    scores of all heads of a tile stay in the second-level cache.
    """

    most_tokens: int

    def tile(self, length: int) -> int:
        """As few tiles as `most_tokens` allows, with the least padding."""
        return -(-length // -(-length // self.most_tokens))

    def forward(
        self, q_BKGQD: jax.Array, k_BKSD: jax.Array, v_BKSD: jax.Array, q_ids: TokenIds, k_ids: TokenIds
    ) -> tuple[jax.Array, jax.Array]:
        """See `BlockKernel.forward`."""
        tiles = _Tiles(q_ids, k_ids, self.tile(q_BKGQD.shape[3]), self.tile(k_BKSD.shape[2]))
        return _forward(q_BKGQD, k_BKSD, v_BKSD, tiles)

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
        """See `BlockKernel.backward`."""
        tiles = _Tiles(q_ids, k_ids, self.tile(q_BKGQD.shape[3]), self.tile(k_BKSD.shape[2]))
        return _backward(q_BKGQD, k_BKSD, v_BKSD, tiles, d_out_BKGQD, lse_BKGQ, delta_BKGQ)


def _forward(q_BKGQD: jax.Array, k_BKSD: jax.Array, v_BKSD: jax.Array, tiles: "_Tiles") -> tuple[jax.Array, jax.Array]:
    rows, key_heads, group, num_queries, head_dim = q_BKGQD.shape
    dtype = accumulation_dtype(q_BKGQD.dtype)
    q_BKGQD, k_BKSD, v_BKSD = tiles.pad_q(q_BKGQD, 3), tiles.pad_k(k_BKSD, 2), tiles.pad_k(v_BKSD, 2)
    scale = 1.0 / math.sqrt(head_dim)
    tile_rows = group * tiles.q_tile

    def query_tile(index: jax.Array, written: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        row, i = index // tiles.num_q, index % tiles.num_q
        q_KRD = tiles.take_q(q_BKGQD, row, i).reshape(key_heads, tile_rows, head_dim)

        def key_tile(
            step: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
            out_KRD, total_KR, peak_KR, bias_QS = state
            j = tiles.live_list[row, i, step]
            k_KSD, v_KSD = tiles.take_k(k_BKSD, row, j), tiles.take_k(v_BKSD, row, j)
            scores = _scores(q_KRD, k_KSD, bias_QS, scale)
            new_peak = jnp.maximum(peak_KR, scores.max(axis=-1))
            p_KRS = jnp.exp(scores - new_peak[..., None])
            shrink = jnp.exp(peak_KR - new_peak)
            total_KR = total_KR * shrink + p_KRS.sum(axis=-1)
            out_KRD = out_KRD * shrink[..., None] + _dot("krs,ksd->krd", p_KRS.astype(v_KSD.dtype), v_KSD, dtype)
            return out_KRD, total_KR, new_peak, tiles.bias(row, i, step + 1, dtype)

        start = (
            jnp.zeros((key_heads, tile_rows, head_dim), dtype),
            jnp.zeros((key_heads, tile_rows), dtype),
            jnp.full((key_heads, tile_rows), DEAD_LSE, dtype),
            tiles.bias(row, i, jnp.int32(0), dtype),
        )
        out_KRD, total_KR, peak_KR, _ = lax.fori_loop(jnp.int32(0), tiles.num_live[row, i], key_tile, start)
        seen = total_KR > 0
        out_KRD = out_KRD / jnp.where(seen, total_KR, 1)[..., None]
        lse_KR = jnp.where(seen, peak_KR + jnp.log(jnp.where(seen, total_KR, 1)), DEAD_LSE)
        out, lse = written
        return tiles.put_q(out, out_KRD, row, i), tiles.put_q(lse, lse_KR, row, i)

    empty = (
        jnp.zeros((rows, key_heads, group, tiles.padded_q, head_dim), dtype),
        jnp.zeros((rows, key_heads, group, tiles.padded_q), dtype),
    )
    out_BKGQD, lse_BKGQ = lax.fori_loop(jnp.int32(0), jnp.int32(rows * tiles.num_q), query_tile, empty)
    return out_BKGQD[:, :, :, :num_queries], lse_BKGQ[:, :, :, :num_queries]


def _backward(
    q_BKGQD: jax.Array,
    k_BKSD: jax.Array,
    v_BKSD: jax.Array,
    tiles: "_Tiles",
    d_out_BKGQD: jax.Array,
    lse_BKGQ: jax.Array,
    delta_BKGQ: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows, key_heads, group, num_queries, head_dim = q_BKGQD.shape
    num_keys = k_BKSD.shape[2]
    dtype = accumulation_dtype(q_BKGQD.dtype)
    q_BKGQD, k_BKSD, v_BKSD = tiles.pad_q(q_BKGQD, 3), tiles.pad_k(k_BKSD, 2), tiles.pad_k(v_BKSD, 2)
    d_out_BKGQD, lse_BKGQ, delta_BKGQ = (tiles.pad_q(x, 3) for x in (d_out_BKGQD, lse_BKGQ, delta_BKGQ))
    scale = 1.0 / math.sqrt(head_dim)
    tile_rows = group * tiles.q_tile
    Grads = tuple[jax.Array, jax.Array, jax.Array]

    def query_tile(index: jax.Array, grads: Grads) -> Grads:
        row, i = index // tiles.num_q, index % tiles.num_q
        q_KRD = tiles.take_q(q_BKGQD, row, i).reshape(key_heads, tile_rows, head_dim)
        d_out_KRD = tiles.take_q(d_out_BKGQD, row, i).reshape(key_heads, tile_rows, head_dim)
        lse_KR = tiles.take_q(lse_BKGQ, row, i).reshape(key_heads, tile_rows)
        delta_KR = tiles.take_q(delta_BKGQ, row, i).reshape(key_heads, tile_rows)

        def key_tile(
            step: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
            dq_KRD, dk_BKSD, dv_BKSD, bias_QS = state
            j = tiles.live_list[row, i, step]
            k_KSD, v_KSD = tiles.take_k(k_BKSD, row, j), tiles.take_k(v_BKSD, row, j)
            scores = _scores(q_KRD, k_KSD, bias_QS, scale)
            p_KRS = jnp.exp(scores - lse_KR[..., None])
            dp_KRS = _dot("krd,ksd->krs", d_out_KRD, v_KSD, dtype)
            ds_KRS = (p_KRS * (dp_KRS - delta_KR[..., None]) * scale).astype(q_KRD.dtype)
            dv_KSD = _dot("krs,krd->ksd", p_KRS.astype(d_out_KRD.dtype), d_out_KRD, dtype)
            dk_KSD = _dot("krs,krd->ksd", ds_KRS, q_KRD, dtype)
            dq_KRD = dq_KRD + _dot("krs,ksd->krd", ds_KRS, k_KSD, dtype)
            dk_BKSD, dv_BKSD = tiles.add_k(dk_BKSD, dk_KSD, row, j), tiles.add_k(dv_BKSD, dv_KSD, row, j)
            return dq_KRD, dk_BKSD, dv_BKSD, tiles.bias(row, i, step + 1, dtype)

        dq_BKGQD, dk_BKSD, dv_BKSD = grads
        dq_KRD = jnp.zeros((key_heads, tile_rows, head_dim), dtype)
        start = (dq_KRD, dk_BKSD, dv_BKSD, tiles.bias(row, i, jnp.int32(0), dtype))
        dq_KRD, dk_BKSD, dv_BKSD, _ = lax.fori_loop(jnp.int32(0), tiles.num_live[row, i], key_tile, start)
        return tiles.put_q(dq_BKGQD, dq_KRD, row, i), dk_BKSD, dv_BKSD

    zero_k = jnp.zeros((rows, key_heads, tiles.padded_k, head_dim), dtype)
    zero_q = jnp.zeros((rows, key_heads, group, tiles.padded_q, head_dim), dtype)
    dq, dk, dv = lax.fori_loop(jnp.int32(0), jnp.int32(rows * tiles.num_q), query_tile, (zero_q, zero_k, zero_k))
    return dq[:, :, :, :num_queries], dk[:, :, :num_keys], dv[:, :, :num_keys]


def _dot(spec: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=dtype)


def _scores(q_KRD: jax.Array, k_KSD: jax.Array, bias_QS: jax.Array, scale: float) -> jax.Array:
    """Scaled scores of one pair of tiles, about `_MASKED` where the query does not see the key: [K, R = G * Q, S]."""
    scores_KRS = _dot("krd,ksd->krs", q_KRD, k_KSD, bias_QS.dtype) * scale
    scores_KGQS = scores_KRS.reshape(q_KRD.shape[0], -1, *bias_QS.shape)
    return (scores_KGQS + bias_QS).reshape(scores_KRS.shape)


class _Tiles:
    """The cut of one pair of blocks into tiles, and which pairs of tiles are live."""

    def __init__(self, q_ids: TokenIds, k_ids: TokenIds, q_tile: int, k_tile: int) -> None:
        num_queries, num_keys = q_ids.segment_BL.shape[1], k_ids.segment_BL.shape[1]
        self.q_tile, self.k_tile = q_tile, k_tile
        self.num_q, self.num_k = -(-num_queries // self.q_tile), -(-num_keys // self.k_tile)
        self.padded_q, self.padded_k = self.num_q * self.q_tile, self.num_k * self.k_tile
        self._q_ids, self._k_ids = pad_ids(q_ids, self.q_tile), pad_ids(k_ids, self.k_tile)
        live_BIJ = live_tiles(tile_ranges(self._q_ids, self.q_tile), tile_ranges(self._k_ids, self.k_tile))
        self.num_live = live_BIJ.sum(axis=-1, dtype=jnp.int32)
        self.live_list = jnp.sort(jnp.where(live_BIJ, jnp.arange(self.num_k, dtype=jnp.int32), self.num_k), axis=-1)

    def pad_q(self, x: jax.Array, dim: int) -> jax.Array:
        return _pad(x, dim, self.padded_q)

    def pad_k(self, x: jax.Array, dim: int) -> jax.Array:
        return _pad(x, dim, self.padded_k)

    def take_q(self, x_BKGQ: jax.Array, row: jax.Array, i: jax.Array) -> jax.Array:
        """[B, K, G, Q, ...] -> [K, G, q_tile, ...]."""
        x_KGQ = lax.dynamic_index_in_dim(x_BKGQ, row, keepdims=False)
        return lax.dynamic_slice_in_dim(x_KGQ, i * self.q_tile, self.q_tile, axis=2)

    def put_q(self, x_BKGQ: jax.Array, tile_KR: jax.Array, row: jax.Array, i: jax.Array) -> jax.Array:
        """Write a tile [K, G * q_tile, ...] back to where `take_q` takes it from."""
        _, key_heads, group, _, *rest = x_BKGQ.shape
        tile = tile_KR.reshape(1, key_heads, group, self.q_tile, *rest)
        zero = jnp.zeros_like(row)
        return lax.dynamic_update_slice(x_BKGQ, tile, (row, zero, zero, i * self.q_tile, *(zero for _ in rest)))

    def take_k(self, x_BKSD: jax.Array, row: jax.Array, j: jax.Array) -> jax.Array:
        """[B, K, S, D] -> [K, k_tile, D]."""
        x_KSD = lax.dynamic_index_in_dim(x_BKSD, row, keepdims=False)
        return lax.dynamic_slice_in_dim(x_KSD, j * self.k_tile, self.k_tile, axis=1)

    def add_k(self, x_BKSD: jax.Array, tile_KSD: jax.Array, row: jax.Array, j: jax.Array) -> jax.Array:
        tile = self.take_k(x_BKSD, row, j) + tile_KSD
        zero = jnp.zeros_like(row)
        return lax.dynamic_update_slice(x_BKSD, tile[None], (row, zero, j * self.k_tile, zero))

    def bias(self, row: jax.Array, i: jax.Array, step: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """[q_tile, k_tile]: 0 where the query sees the key of the `step`-th live tile, `_MASKED` elsewhere.

        The loops compute it one step ahead and carry it: XLA would otherwise fuse it into every pass over the
        scores, once for each head, and on CPU such a pass takes twice as long.
        """
        j = jnp.minimum(self.live_list[row, i, jnp.minimum(step, self.num_k - 1)], self.num_k - 1)
        q_ids = TokenIds(*(_take_row(field, row, i, self.q_tile) for field in self._q_ids))
        k_ids = TokenIds(*(_take_row(field, row, j, self.k_tile) for field in self._k_ids))
        return jnp.where(visible(q_ids, k_ids), 0, _MASKED).astype(dtype)


def _take_row(x_BL: jax.Array, row: jax.Array, index: jax.Array, tile: int) -> jax.Array:
    return lax.dynamic_slice(x_BL, (row, index * tile), (1, tile))[0]


def _pad(x: jax.Array, dim: int, length: int) -> jax.Array:
    if x.shape[dim] == length:
        return x
    widths = [(0, 0)] * x.ndim
    widths[dim] = (0, length - x.shape[dim])
    return jnp.pad(x, widths)
