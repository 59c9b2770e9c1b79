"""SwiGLU, and the same a chunk of a row's tokens at a time, so that [L, F] never exists for a whole row.

    h_BLD  --> silu(h w1) * (h w3)  [B, L, F]  --> w2 --> [B, L, D]

    chunks of a device's tokens    0    1    2  ..          [B, C, F] exists for one of them at a time, in both passes
      forward    out            -> 0    1    2               saved: h and the weights
      backward   chunk again, dh-> 0    1    2               dw1, dw3, dw2 are summed in float32 on the device

Chunks are cut of what each device holds, inside `jax.shard_map`: weights are gathered once for all chunks, and their
gradients meet once. Rows of at most one chunk take the plain way.

Shape suffixes as in model.py; C tokens of a chunk.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from lwm_train.mesh import spec_of

_Four = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def swiglu(
    h_BLD: jax.Array, w1_DF: jax.Array, w3_DF: jax.Array, w2_FD: jax.Array, chunk: int | None, mesh: Mesh | None
) -> jax.Array:
    """(silu(h w1) * (h w3)) w2. chunk: tokens of a row on a device at a time; None takes the row whole."""
    local_tokens = h_BLD.shape[1] // (1 if mesh is None else mesh.shape["sp"])
    if chunk is None or local_tokens <= chunk:
        return _whole(h_BLD, w1_DF, w3_DF, w2_FD)
    if mesh is None:
        return _chunked(chunk, h_BLD, w1_DF, w3_DF, w2_FD)

    if w1_DF.shape[1] % mesh.shape["tp"]:
        raise ValueError(f"mesh: tp {mesh.shape['tp']} does not divide an ffn_dim of {w1_DF.shape[1]}")

    def on_each_device(h: jax.Array, w1: jax.Array, w3: jax.Array, w2: jax.Array) -> jax.Array:
        return jax.lax.psum(_chunked(chunk, h, w1, w3, w2), "tp")

    tokens = spec_of("batch", "length", None)
    up, down = PartitionSpec(None, "tp"), PartitionSpec("tp", None)
    sharded = jax.shard_map(
        on_each_device, mesh=mesh, in_specs=(tokens, up, up, down), out_specs=tokens, check_vma=False
    )
    return sharded(h_BLD, w1_DF, w3_DF, w2_FD)


def _whole(h_BLD: jax.Array, w1_DF: jax.Array, w3_DF: jax.Array, w2_FD: jax.Array) -> jax.Array:
    return linear(jax.nn.silu(linear(h_BLD, w1_DF)) * linear(h_BLD, w3_DF), w2_FD)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(chunk: int, h_BLD: jax.Array, w1_DF: jax.Array, w3_DF: jax.Array, w2_FD: jax.Array) -> jax.Array:
    out_NBCD = jax.lax.map(lambda h_BCD: _whole(h_BCD, w1_DF, w3_DF, w2_FD), _cut(h_BLD, chunk))
    return _join(out_NBCD, h_BLD.shape[1])


def _chunked_forward(chunk: int, h: jax.Array, w1: jax.Array, w3: jax.Array, w2: jax.Array) -> tuple[jax.Array, _Four]:
    return _chunked(chunk, h, w1, w3, w2), (h, w1, w3, w2)


def _chunked_backward(chunk: int, saved: _Four, dy_BLD: jax.Array) -> _Four:
    h_BLD, *weights = saved

    def one(sums: list[jax.Array], h_and_dy: tuple[jax.Array, jax.Array]) -> tuple[list[jax.Array], jax.Array]:
        h_BCD, dy_BCD = h_and_dy
        dh_BCD, *d_weights = jax.vjp(_whole, h_BCD, *weights)[1](dy_BCD)
        return [s + d.astype(s.dtype) for s, d in zip(sums, d_weights, strict=True)], dh_BCD

    zeros = [jnp.zeros(w.shape, jnp.promote_types(jnp.float32, w.dtype)) for w in weights]
    d_weights, dh_NBCD = jax.lax.scan(one, zeros, (_cut(h_BLD, chunk), _cut(dy_BLD, chunk)))
    dw1, dw3, dw2 = (d.astype(w.dtype) for d, w in zip(d_weights, weights, strict=True))
    return _join(dh_NBCD, h_BLD.shape[1]), dw1, dw3, dw2


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _cut(x_BLD: jax.Array, most: int) -> jax.Array:
    """[N, B, C, D] with C <= most, the last chunk filled up with zeros."""
    rows, length, dim = x_BLD.shape
    num_chunks = -(-length // most)
    chunk = -(-length // num_chunks)
    x_BLD = jnp.pad(x_BLD, ((0, 0), (0, num_chunks * chunk - length), (0, 0)))
    return x_BLD.reshape(rows, num_chunks, chunk, dim).swapaxes(0, 1)


def _join(x_NBCD: jax.Array, length: int) -> jax.Array:
    num_chunks, rows, chunk, dim = x_NBCD.shape
    return x_NBCD.swapaxes(0, 1).reshape(rows, num_chunks * chunk, dim)[:, :length]


@jax.custom_vjp
def linear(x_BLD: jax.Array, w_DF: jax.Array) -> jax.Array:
    """x @ w.

    In the backward pass the incoming gradient is made once, before both products that need it: XLA's CPU backend
    otherwise computes it again inside each, element by element, and a layer's backward pass takes 2.4 times as long.
    """
    return x_BLD @ w_DF


def _linear_forward(x_BLD: jax.Array, w_DF: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x_BLD @ w_DF, (x_BLD, w_DF)


def _linear_backward(saved: tuple[jax.Array, jax.Array], dy_BLF: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BLD, w_DF = saved
    dy_BLF = jax.lax.optimization_barrier(dy_BLF)
    return dy_BLF @ w_DF.T, jnp.einsum("bld,blf->df", x_BLD, dy_BLF)


linear.defvjp(_linear_forward, _linear_backward)
