"""The block kernel for TPU: jax's own Pallas kernel `splash_attention`, given the exact mask of packed rows.

Splash knows two masks that are data: "same segment", and "key number <= q_sequence[query]". Together they are enough
once the keys stand in the order of the row, because what a query may see of its segment is then a stretch that ends
at one place, whatever order the queries are in:

    keys, in row order    segment   1 1 1 2 2 2 4        a query of segment 2, position 4:
                          position  0 1 5 0 3 4 2        last key at or before it: number 5
                          number    0 1 2 3 4 5 6        sees segment 2 up to number 5: positions 0, 3, 4

The places come from one sort of keys and queries together. Keys that are not in row order (`token_order` always leaves
them so on a device) are put there first, and their gradients back. Which tiles are live is data too: splash reads it
from the tables of its `MaskInfo`, skips dead tiles, and does not fetch their keys. Nothing is quadratic but these
tables, whose tiles grow so that they stay below a quarter of the scalar memory.

Splash's own code gives out, dq, dk, dv in the dtype of the inputs, so a ring of bf16 rounds once for each meeting.

Legend: B rows, H = K * G query heads, Q queries, S keys, D head size, I and J tiles of queries and keys.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from lwm_train.attention.block import DEAD_LSE, TokenIds
from lwm_train.attention.mask import live_tiles, pad_ids, tile_ranges

_TILE = 128  # lanes of a register, and the chunk that `token_order` deals
_MOST_TILES = 128  # on a side: two int32 tables of 128 x 128 take 128 KiB of the scalar memory
_LAST = jnp.iinfo(jnp.int32).max
_NO_QUERY, _NO_KEY = -1, -2  # segments of padding, so that it never meets


@dataclass(frozen=True)
class SplashKernel:
    """The `BlockKernel` of this module; `interpret` runs it on any device, slowly."""

    interpret: bool = False

    def tile(self, length: int) -> int:
        """128 tokens, doubled until there are few enough tiles."""
        tile = _TILE
        while -(-length // tile) > _MOST_TILES:
            tile *= 2
        return tile

    def forward(
        self, q_BKGQD: jax.Array, k_BKSD: jax.Array, v_BKSD: jax.Array, q_ids: TokenIds, k_ids: TokenIds
    ) -> tuple[jax.Array, jax.Array]:
        """See `BlockKernel.forward`."""
        return self._each_row(self._forward_row, (q_BKGQD, k_BKSD, v_BKSD), q_ids, k_ids)

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
        arrays = (q_BKGQD, k_BKSD, v_BKSD, d_out_BKGQD, lse_BKGQ, delta_BKGQ)
        return self._each_row(self._backward_row, arrays, q_ids, k_ids)

    def _forward_row(self, arrays: tuple[jax.Array, ...], row: "_Row") -> tuple[jax.Array, jax.Array]:
        q_KGQD, k_KSD, v_KSD = arrays
        kernel = splash.SplashAttentionKernel(
            row.mask(row.next_keys_1IJ),
            None,
            None,
            block_sizes=splash.BlockSizes(row.q_tile, row.k_tile),
            is_mqa=False,
            save_residuals=True,
            mask_value=splash.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name=None,
            mask_function=_not_later,
            interpret=self.interpret,
        )
        out_HQD, (lse_HQ,) = kernel(row.take_q(_scaled(q_KGQD)), row.take_k(k_KSD), row.take_k(v_KSD), row.segments)
        seen_HQ = lse_HQ > 0.5 * splash.DEFAULT_MASK_VALUE  # -inf of a dead tile, or the mask's own value
        out_HQD = jnp.where(seen_HQ[..., None], out_HQD.astype(jnp.float32), 0)
        return row.put_q(out_HQD, q_KGQD.shape), row.put_q(jnp.where(seen_HQ, lse_HQ, DEAD_LSE), q_KGQD.shape[:-1])

    def _backward_row(self, arrays: tuple[jax.Array, ...], row: "_Row") -> tuple[jax.Array, jax.Array, jax.Array]:
        q_KGQD, k_KSD, v_KSD, d_out_KGQD, lse_KGQ, delta_KGQ = arrays
        operands = (
            row.take_q(_scaled(q_KGQD)),
            row.take_k(k_KSD),
            row.take_k(v_KSD),
            row.segments,
            None,
            row.take_q(lse_KGQ),
            row.take_q(d_out_KGQD),
            row.take_q(delta_KGQ),
        )
        layout = splash.QKVLayout.HEAD_DIM_MINOR
        run: dict[str, Any] = {
            "bq": row.q_tile,
            "bkv": row.k_tile,
            "is_mqa": False,
            "mask_value": splash.DEFAULT_MASK_VALUE,
            "attn_logits_soft_cap": None,
            "q_layout": layout,
            "k_layout": layout,
            "v_layout": layout,
            "mask_function": _not_later,
            "interpret": self.interpret,
        }
        # Its public derivative takes the log-sum-exp of this meeting; a ring has that of the whole row.
        dq_HQD = splash._splash_attention_bwd_dq(*operands, mask_info=row.mask(row.next_keys_1IJ), **run)
        _, dk_KSD, dv_KSD = splash._splash_attention_bwd_dkv(
            *operands,
            mask_info=row.mask(row.next_queries_1IJ),
            bkv_compute=row.k_tile,
            use_fused_bwd_kernel=False,
            **run,
        )
        dq_HQD = dq_HQD.astype(jnp.float32) * _scale(q_KGQD)
        return row.put_q(dq_HQD, q_KGQD.shape), row.put_k(dk_KSD), row.put_k(dv_KSD)

    def _each_row(self, function, arrays, q_ids: TokenIds, k_ids: TokenIds):  # type: ignore[no-untyped-def]
        """`function` of every row, one after the other: splash takes the tables of one row."""
        if arrays[0].dtype == jnp.float64:
            raise ValueError("attention kernel: splash takes bfloat16 and float32, got float64; take xla")
        q_tile, k_tile = self.tile(arrays[0].shape[3]), self.tile(arrays[1].shape[2])

        def one_row(row):  # type: ignore[no-untyped-def]
            arrays, q_ids, k_ids = row
            return function(arrays, _Row(q_ids, k_ids, q_tile, k_tile))

        rows = (arrays, q_ids, k_ids)
        if arrays[0].shape[0] > 1:
            return lax.map(one_row, rows)
        only = one_row(jax.tree.map(lambda x: x[0], rows))  # type: ignore[no-untyped-call]
        return jax.tree.map(lambda x: x[None], only)


def _not_later(last_key: jax.Array, key: jax.Array) -> jax.Array:
    return key <= last_key


def _scale(q_KGQD: jax.Array) -> float:
    return 1.0 / math.sqrt(q_KGQD.shape[-1])


def _scaled(q_KGQD: jax.Array) -> jax.Array:
    return (q_KGQD.astype(jnp.float32) * _scale(q_KGQD)).astype(q_KGQD.dtype)


class _Row:
    """One row's mask as splash reads it, and the way of its arrays into splash's layout and back.

    last_key_Q: int32, the number of the last key, in row order, that is not later than the query.
    live_1IJ: int32, 1 for tiles that may hold a live pair.
    next_keys_1IJ: int32, the tile of keys to fetch next, walking the tiles row by row; next_queries_1IJ: the tile of
        queries, walking them column by column.
    """

    def __init__(self, q_ids: TokenIds, k_ids: TokenIds, q_tile: int, k_tile: int) -> None:
        self.q_tile, self.k_tile = q_tile, k_tile
        last_key_Q, self._key_order_S = _row_order(q_ids, k_ids)
        num_keys = self._key_order_S.shape[0]
        self._in_order = jnp.all(self._key_order_S == jnp.arange(num_keys))
        sorted_ids = TokenIds(*(field[self._key_order_S][None] for field in k_ids))
        q_row, k_row = pad_ids(TokenIds(*(x[None] for x in q_ids)), q_tile), pad_ids(sorted_ids, k_tile)
        live_IJ = live_tiles(tile_ranges(q_row, q_tile), tile_ranges(k_row, k_tile))[0]
        self.live_1IJ = live_IJ.astype(jnp.int32)[None]
        self.next_keys_1IJ, self.next_queries_1IJ = _next_live(live_IJ)[None], _next_live(live_IJ.T).T[None]
        self.last_key_Q = _pad(last_key_Q, 0, q_tile)
        q_segment_Q, k_segment_S = q_row.segment_BL[0], k_row.segment_BL[0]
        self.segments = splash.SegmentIds(
            q=jnp.where(q_segment_Q == 0, _NO_QUERY, q_segment_Q), kv=jnp.where(k_segment_S == 0, _NO_KEY, k_segment_S)
        )

    def mask(self, next_tiles_1IJ: jax.Array) -> MaskInfo:
        return MaskInfo(next_tiles_1IJ, None, self.live_1IJ, None, self.last_key_Q)  # type: ignore[arg-type]

    def take_q(self, x_KGQ: jax.Array) -> jax.Array:
        """[K, G, Q, ...] -> [H, padded Q, ...]."""
        return _pad(x_KGQ.reshape(-1, *x_KGQ.shape[2:]), 1, self.q_tile)

    def put_q(self, x_HQ: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return x_HQ[:, : shape[2]].reshape(shape)

    def take_k(self, x_KSD: jax.Array) -> jax.Array:
        """[K, S, D] -> [K, padded S, D], in row order."""
        in_order = lax.cond(self._in_order, lambda x: x, lambda x: x[:, self._key_order_S], x_KSD)
        return _pad(in_order, 1, self.k_tile)

    def put_k(self, x_KSD: jax.Array) -> jax.Array:
        """The way back of `take_k`, in float32."""
        x_KSD = x_KSD[:, : self._key_order_S.shape[0]].astype(jnp.float32)
        return lax.cond(self._in_order, lambda x: x, lambda x: jnp.zeros_like(x).at[:, self._key_order_S].set(x), x_KSD)


def _row_order(q_ids: TokenIds, k_ids: TokenIds) -> tuple[jax.Array, jax.Array]:
    """last_key_Q as in `_Row`, and the keys by segment and position, padding last: int32 [Q] and [S]."""
    num_keys = k_ids.segment_BL.shape[0]
    segment, position = (jnp.concatenate(pair) for pair in zip(k_ids, q_ids, strict=True))
    number = jnp.arange(segment.shape[0], dtype=jnp.int32)
    segment = jnp.where(segment == 0, _LAST, segment)
    _, _, number = lax.sort((segment, position, number), num_keys=2)  # stable: a key before a query of its place
    is_key = number < num_keys
    last_key = jnp.cumsum(is_key, dtype=jnp.int32) - 1
    last_key_Q = jnp.zeros_like(number).at[number].set(last_key, unique_indices=True)[num_keys:]
    return last_key_Q, jnp.zeros(num_keys, jnp.int32).at[jnp.where(is_key, last_key, num_keys)].set(number, mode="drop")


def _next_live(live_IJ: jax.Array) -> jax.Array:
    """For each pair of tiles j of the next live one, itself included, row by row; 0 after the last."""
    flat = jnp.where(live_IJ.reshape(-1), jnp.arange(live_IJ.size, dtype=jnp.int32), _LAST)
    following = lax.cummin(flat, reverse=True)
    return jnp.where(following == _LAST, 0, following % live_IJ.shape[1]).reshape(live_IJ.shape)


def _pad(x: jax.Array, dim: int, multiple: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[dim] = (0, -x.shape[dim] % multiple)
    return jnp.pad(x, widths)
