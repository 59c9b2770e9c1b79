"""Ring attention: queries stay, blocks of keys and values travel round the mesh axis, one device at a time.

Four devices; column = hop, entry = whose keys are there. Device d holds block (d - hop) mod N at each hop:

    hop         0   1   2   3
    device 0    0   3   2   1        forward:  N - 1 sends of (k, v, ids); block h + 1 is sent while h is computed
    device 1    1   0   3   2        backward: the same, and the gradients of the travelling block go with it, one
    device 2    2   1   0   3                  send behind, from the last hop straight home: N - 1 sends too, since
    device 3    3   2   1   0                  those of hop 0 never leave home; it is computed last

Before the first hop all devices agree on the last hop that any of them needs (from the ranges of the tiles, a few
numbers per tile): later hops are neither computed nor sent. A hop that this device does not need, but another
does, is passed on and not computed.

The custom VJP keeps q, k, v, out and lse of the local chunk and computes scores again, so memory is linear in the
local chunk. Names follow `block.py`; `*_local` functions run inside `jax.shard_map`.
"""

from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lwm_train.attention.block import ATTENTION_RESULT, DEAD_LSE, BlockKernel, TokenIds, accumulation_dtype, merge
from lwm_train.attention.mask import TileRanges, live_tiles, pad_ids, tile_ranges

T = TypeVar("T")


class _Block(NamedTuple):
    """What travels: one device's keys and values, and the segments and positions of their tokens; three sends."""

    k_BKSD: jax.Array
    v_BKSD: jax.Array
    ids_2BS: jax.Array

    @property
    def ids(self) -> TokenIds:
        return TokenIds(self.ids_2BS[0], self.ids_2BS[1])


class _Gradients(NamedTuple):
    """What comes home: the sums for one block's keys and values, in the accumulation dtype; two sends."""

    k_BKSD: jax.Array
    v_BKSD: jax.Array

    def plus(self, more: "_Gradients") -> "_Gradients":
        return _Gradients(self.k_BKSD + more.k_BKSD, self.v_BKSD + more.v_BKSD)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def ring_local(
    kernel: BlockKernel,
    axis: str,
    all_axes: tuple[str, ...],
    q_BKGQD: jax.Array,
    k_BKSD: jax.Array,
    v_BKSD: jax.Array,
    ids: TokenIds,
) -> jax.Array:
    """Attention of the local queries to the keys of all devices on `axis`; out [B, K, G, Q, D] in q's dtype.

    `all_axes` are all axes of the mesh: the number of hops must be the same on every device of the mesh.
    """
    return _forward(kernel, axis, all_axes, q_BKGQD, k_BKSD, v_BKSD, ids)[0]


def _forward(
    kernel: BlockKernel,
    axis: str,
    all_axes: tuple[str, ...],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ids: TokenIds,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    needed = _needed_hops(axis, kernel.tile(q.shape[3]), ids)
    last_hop = _last_hop(needed, all_axes)
    dtype = accumulation_dtype(q.dtype)
    State = tuple[_Block, jax.Array, jax.Array]

    def compute(hop: jax.Array, state: State) -> tuple[jax.Array, jax.Array]:
        block, out, lse = state

        def meet(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
            return merge(out, lse, *kernel.forward(q, block.k_BKSD, block.v_BKSD, ids, block.ids))

        return lax.cond(needed[hop], meet, lambda out, lse: (out, lse), out, lse)

    def one_hop(hop: jax.Array, state: State) -> State:
        onward = _send(state[0], axis)
        return onward, *compute(hop, state)

    start = (_own_block(k, v, ids), jnp.zeros(q.shape, dtype), jnp.full(q.shape[:-1], DEAD_LSE, dtype))
    state = lax.fori_loop(jnp.int32(0), last_hop, one_hop, start)
    out, lse = compute(last_hop, state)
    out, lse = checkpoint_name((out.astype(q.dtype), lse), ATTENTION_RESULT)
    return out, (q, k, v, *ids, out, lse, needed, last_hop)


def _backward(
    kernel: BlockKernel, axis: str, all_axes: tuple[str, ...], saved: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, segment, position, out, lse, needed, last_hop = saved
    ids = TokenIds(segment, position)
    dtype = accumulation_dtype(q.dtype)
    delta = jnp.sum(out.astype(dtype) * d_out.astype(dtype), axis=-1)
    Shares = tuple[jax.Array, _Gradients]
    State = tuple[_Block, jax.Array, _Gradients]

    def compute(hop: jax.Array, block: _Block, dq: jax.Array) -> Shares:
        """dq with this meeting's share added, and the share of the block's gradients."""

        def meet(dq: jax.Array) -> Shares:
            more, dk, dv = kernel.backward(q, block.k_BKSD, block.v_BKSD, ids, block.ids, d_out, lse, delta)
            return dq + more, _Gradients(dk, dv)

        return lax.cond(needed[hop], meet, lambda dq: (dq, nothing), dq)

    def one_hop(hop: jax.Array, state: State) -> State:
        block, dq, d_block = state
        onward, arrived = _send(block, axis), _send(d_block, axis)
        dq, share = compute(hop, block, dq)  # needs neither, so both are under way meanwhile
        return onward, dq, arrived.plus(share)

    def no_other(dq: jax.Array) -> Shares:
        return dq, nothing

    def next_device(dq: jax.Array) -> Shares:
        """Hop 1 is the last."""
        dq, d_block = compute(last_hop, _send(own, axis), dq)
        return dq, _send(d_block, axis, -1)

    def further(dq: jax.Array) -> Shares:
        """Hops 1 to last_hop; dq, and the gradients of the own block as they come home."""
        block = _send(own, axis)
        onward = _send(block, axis)  # nothing has come with the first block yet
        state = onward, *compute(jnp.int32(1), block, dq)
        block, dq, d_block = lax.fori_loop(jnp.int32(2), last_hop, one_hop, state)
        arrived = _send(d_block, axis)
        dq, share = compute(last_hop, block, dq)
        return dq, _send_home(arrived.plus(share), last_hop, axis)

    own = _own_block(k, v, ids)
    nothing = _Gradients(jnp.zeros(k.shape, dtype), jnp.zeros(k.shape, dtype))
    ways = [no_other, next_device, further][: lax.axis_size(axis)]
    dq, d_block = lax.switch(jnp.minimum(last_hop, len(ways) - 1), ways, jnp.zeros(q.shape, dtype))
    dq, share = compute(jnp.int32(0), own, dq)
    dk, dv = d_block.plus(share)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


ring_local.defvjp(_forward, _backward)


def _own_block(k: jax.Array, v: jax.Array, ids: TokenIds) -> _Block:
    return _Block(k, v, jnp.stack(ids))


def _needed_hops(axis: str, tile: int, ids: TokenIds) -> jax.Array:
    """bool [N]: at which hops this device's queries meet a live tile of keys."""
    num_devices = lax.axis_size(axis)
    ranges = tile_ranges(pad_ids(ids, tile), tile)
    all_ranges = lax.all_gather(jnp.stack(ranges), axis)
    needed_from = jax.vmap(lambda keys: live_tiles(ranges, TileRanges(*keys)).any())(all_ranges)
    hops = jnp.arange(num_devices)
    return needed_from[(lax.axis_index(axis) - hops) % num_devices]


def _last_hop(needed: jax.Array, all_axes: tuple[str, ...]) -> jax.Array:
    """The last hop that any device of the mesh needs, int32, the same on all of them."""
    hops = jnp.arange(needed.shape[0], dtype=jnp.int32)
    return lax.pmax(jnp.max(jnp.where(needed, hops, 0)), all_axes)


def _send(tree: T, axis: str, distance: int = 1) -> T:
    """Pass a pytree to the device `distance` further on, round the ring."""
    num_devices = lax.axis_size(axis)
    pairs = [(source, (source + distance) % num_devices) for source in range(num_devices)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis, pairs), tree)


def _send_home(tree: T, hop: jax.Array, axis: str) -> T:
    """Bring what is `hop` devices from home, 2 at least, straight back."""
    branches = [partial(_send, axis=axis, distance=-distance) for distance in range(2, lax.axis_size(axis))]
    return lax.switch(hop - 2, branches, tree)
