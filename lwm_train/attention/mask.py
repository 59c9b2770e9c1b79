"""Who sees whom: the mask of packed rows, token by token and tile by tile.

    query i sees key j  iff  segment[i] == segment[j], segment[i] != 0, position[j] <= position[i]

The rule holds for any order of the tokens. For tiles (stretches of a block) the question "is there a live pair?"
is answered from a few numbers of each tile, on device. It may say yes for a dead pair of tiles, never no for a
live one; for tiles that are stretches of the row in its own order the answer is exact:

    tile A | 1 1 1 2 |   tile B | 2 2 3 3 |      A's queries end before B's keys begin in segment 2: dead
                                                 B's queries see A's keys in segment 2: live

Legend: B rows, L tokens, Q queries, S keys, I tiles of queries, J tiles of keys, T tokens of a tile.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lwm_train.attention.block import TokenIds

_LAST = jnp.iinfo(jnp.int32).max


class TileRanges(NamedTuple):
    """The numbers of each tile that decide whether two tiles can hold a live pair; all int32 [B, tiles]."""

    first_segment: jax.Array  # of the live tokens; a tile of padding has first > last
    last_segment: jax.Array
    least_position: jax.Array  # of the live tokens, in any segment
    greatest_position: jax.Array
    first_position: jax.Array  # least position in the first segment
    last_position: jax.Array  # greatest position in the last segment


def visible(q_ids: TokenIds, k_ids: TokenIds) -> jax.Array:
    """The mask itself, bool [..., Q, S], for ids of shape [..., Q] and [..., S]."""
    q_segment, k_segment = q_ids.segment_BL[..., :, None], k_ids.segment_BL[..., None, :]
    same = (q_segment == k_segment) & (q_segment != 0)
    return same & (k_ids.position_BL[..., None, :] <= q_ids.position_BL[..., :, None])


def pad_ids(ids: TokenIds, tile: int) -> TokenIds:
    """Fill the last tile with padding, so that the length is a multiple of `tile`."""
    short = -ids.segment_BL.shape[1] % tile
    return TokenIds(*(jnp.pad(field, ((0, 0), (0, short))) for field in ids))


def tile_ranges(ids: TokenIds, tile: int) -> TileRanges:
    """Summarise tiles of `tile` tokens; the length of the block is a multiple of `tile`."""
    rows, length = ids.segment_BL.shape
    segment = ids.segment_BL.reshape(rows, length // tile, tile)
    position = ids.position_BL.reshape(rows, length // tile, tile)
    live = segment != 0
    first_segment = jnp.min(jnp.where(live, segment, _LAST), axis=-1)
    last_segment = jnp.max(jnp.where(live, segment, 0), axis=-1)
    in_first = live & (segment == first_segment[..., None])
    in_last = live & (segment == last_segment[..., None])
    return TileRanges(
        first_segment=first_segment,
        last_segment=last_segment,
        least_position=jnp.min(jnp.where(live, position, _LAST), axis=-1),
        greatest_position=jnp.max(jnp.where(live, position, -1), axis=-1),
        first_position=jnp.min(jnp.where(in_first, position, _LAST), axis=-1),
        last_position=jnp.max(jnp.where(in_last, position, -1), axis=-1),
    )


def live_tiles(queries: TileRanges, keys: TileRanges) -> jax.Array:
    """Which pairs of tiles may hold a live pair of tokens: bool [B, I, J]."""
    q = TileRanges(*(field[:, :, None] for field in queries))
    k = TileRanges(*(field[:, None, :] for field in keys))
    segments_meet = (q.first_segment <= k.last_segment) & (k.first_segment <= q.last_segment)
    positions_meet = k.least_position <= q.greatest_position
    # A live pair also has (segment, position) of the key <= that of the query, in the order of the row.
    in_row_order = (k.first_segment < q.last_segment) | (
        (k.first_segment == q.last_segment) & (k.first_position <= q.last_position)
    )
    return segments_meet & positions_meet & in_row_order
