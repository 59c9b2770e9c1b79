"""PyPI `ringattention` 0.1.2 as the benchmarks of attention call it, where it is installed."""

import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.backend
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec


def import_ringattention() -> Callable[..., Any] | None:
    """The peer's function; jax has dropped `jax.lib.xla_bridge`, which it asks for the platform when imported."""
    bridge = types.ModuleType("jax.lib.xla_bridge")
    bridge.get_backend = jax.extend.backend.get_backend  # type: ignore[attr-defined]
    sys.modules.setdefault("jax.lib.xla_bridge", bridge)
    jax.lib.xla_bridge = bridge  # type: ignore[attr-defined]
    try:
        from ringattention import ringattention  # type: ignore[import-not-found]
    except ImportError as error:
        print(f"PyPI ringattention is left out: {error}")
        return None
    return ringattention  # type: ignore[no-any-return]


def peer(
    function: Callable[..., Any],
    mesh: Mesh,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment: jax.Array,
    position: jax.Array,
) -> jax.Array:
    """`ringattention` takes causality by blocks of the row, so it gets the row in its own order."""
    chunk = min(512, q.shape[1] // mesh.shape["sp"])
    heads = PartitionSpec(("dp", "fsdp"), "sp", "tp", None)
    whole_row = PartitionSpec(("dp", "fsdp"), None)  # it cuts the segment ids itself
    blocks = {
        "causal_block_size": 1,
        "deterministic": True,
        "dropout_rng": None,
        "attn_pdrop": 0.0,
        "query_chunk_size": chunk,
        "key_chunk_size": chunk,
        "dtype": q.dtype,
        "policy": jax.checkpoint_policies.nothing_saveable,
        "precision": None,
        "prevent_cse": True,
    }
    specs = (heads, heads, heads, PartitionSpec(("dp", "fsdp"), None, None, None), whole_row)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, segment: jax.Array) -> jax.Array:
        return function(q, k, v, bias, segment, None, "sp", True, blocks)  # type: ignore[no-any-return]

    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    bias = jnp.zeros((q.shape[0], 1, 1, q.shape[1]), q.dtype)
    return sharded(q, k, v, bias, segment)
