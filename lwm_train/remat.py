"""Which activations of a layer outlive its forward pass, by name.

                    kept for each layer                 made again in the backward pass
    none            everything                          nothing
    block           its input                           everything, attention too
    save-attention  its input, attention's out and lse  everything but attention: the ring goes round once less
    offload         the same, in the host's memory      the same

Attention's custom VJPs give its output and log-sum-exp the name ATTENTION_RESULT; the input is named here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from lwm_train.attention.block import ATTENTION_RESULT

_LAYER_INPUT = "layer_input"
_HOST_MEMORY = "pinned_host"


def remat(policy: str, block: Callable[[jax.Array, Any], Any], mesh: Mesh | None) -> Callable[[jax.Array, Any], Any]:
    """`block(x, layer)`, keeping what `policy` says. ValueError for another name, or `offload` where it cannot be."""
    policies = jax.checkpoint_policies
    if policy == "none":
        return block
    if policy == "block":
        return jax.checkpoint(block)
    if policy == "save-attention":
        return jax.checkpoint(block, policy=policies.save_only_these_names(ATTENTION_RESULT))
    if policy != "offload":
        raise ValueError(f"remat: got {policy!r}, wanted none, block, save-attention or offload")
    device = jax.devices()[0] if mesh is None else mesh.local_devices[0]
    if _HOST_MEMORY not in {memory.kind for memory in device.addressable_memories()}:
        raise ValueError(
            f"remat: offload: {device.platform} devices have no {_HOST_MEMORY} memory; take save-attention or block"
        )

    def named(x: jax.Array, layer: Any) -> Any:
        return block(checkpoint_name(x, _LAYER_INPUT), layer)

    offload = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_LAYER_INPUT, ATTENTION_RESULT],
        offload_src="device",
        offload_dst=_HOST_MEMORY,
    )
    return jax.checkpoint(named, policy=offload)
