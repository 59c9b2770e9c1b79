"""The device mesh, and which axis of it each array axis is spread over.

dp     rows of a batch
fsdp   rows of a batch; also parameters and optimizer state, gathered where they are used
tp     attention heads, the MLP's width, the vocabulary
sp     tokens of a row: the ring
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lwm_train.config import MeshSpec

AXES = ("dp", "fsdp", "tp", "sp")

# Logical axis of an array -> mesh axes. The parameter rules are the release's (lwm/llama.py).
RULES: dict[str | None, str | tuple[str, ...] | None] = {
    None: None,
    "batch": ("dp", "fsdp"),
    "length": "sp",
    "layer": None,
    "dim": "fsdp",
    "heads": "tp",
    "ffn": "tp",
    "vocab": "tp",
}


def make_mesh(spec: MeshSpec, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (all of them by default; on one host, as many as the axes need).

    ValueError where the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(spec, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, len(devices) // known)
    elif len(devices) > known and jax.process_count() == 1:
        devices = devices[:known]
    if math.prod(sizes) != len(devices):
        wanted = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ValueError(
            f"mesh: {wanted} = {math.prod(sizes)} devices; there are {len(devices)} ({devices[0].platform})"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)


def spec_of(*logical: str | None) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes."""
    return PartitionSpec(*(RULES[axis] for axis in logical))


def sharding(mesh: Mesh, *logical: str | None) -> NamedSharding:
    """Where an array with these logical axes lies."""
    return NamedSharding(mesh, spec_of(*logical))


def constrain(x: jax.Array, mesh: Mesh | None, *logical: str | None) -> jax.Array:
    """`x`, held by the compiler to the layout of these logical axes; without a mesh, `x`."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, sharding(mesh, *logical))


def tree_shardings(mesh: Mesh, logical_axes: Any, tree: Any) -> Any:
    """The sharding of every leaf of `tree`; `logical_axes` has a tuple of logical axes in each leaf's place.

    An axis that its mesh axes do not divide is left whole (a demo's odd vocabulary on many devices). A leaf that
    is not there (None: a tied head) stays so.
    """

    def one(leaf: Any, axes: tuple[str | None, ...]) -> NamedSharding | None:
        if leaf is None:
            return None
        parts = []
        for size, axis in zip(leaf.shape, axes, strict=True):
            names = RULES[axis]
            names_tuple = (names,) if isinstance(names, str) else names or ()
            parts.append(names if size % math.prod(mesh.shape[name] for name in names_tuple) == 0 else None)
        return NamedSharding(mesh, PartitionSpec(*parts))

    return jax.tree.map(one, tree, logical_axes, is_leaf=lambda leaf: leaf is None)


def request_devices(specs: Sequence[MeshSpec]) -> None:
    """On a machine without accelerators, let JAX simulate as many CPU devices as the largest mesh names.

    Must run before the first use of a device; later, or where XLA_FLAGS already says how many, it changes nothing.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    wanted = max(math.prod(size for axis in AXES if (size := getattr(spec, axis)) != -1) for spec in specs)
    with contextlib.suppress(RuntimeError):  # a device is in use already
        jax.config.update("jax_num_cpu_devices", wanted)
