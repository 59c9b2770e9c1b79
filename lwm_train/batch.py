"""Batch: rows as the train step takes them. The one shift from tokens to targets, and the one order of tokens.

    row             ^  a  b  C  D  $ | ^  e  F | .        loss_weights are of the token itself (lwm_data.format.packed)
    tokens          ^  a  b  C  D  $   ^  e  F   .
    targets         a  b  C  D  $  ^   e  F  .   0        the next token
    target_weights  0  0  w  w  w  0   0  v  0   0        the next token's loss weight: 0 on every segment's first

Then every array is put in the order in which the ring's devices hold the row (attention/order.py); the loss does
not depend on it, since every token carries its target, segment and position along.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32

from lwm_data.format.packed import Arrays
from lwm_train.mesh import sharding


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Arrays [rows, length]; numpy on the host, jax arrays on the mesh."""

    tokens: jax.Array  # int32
    vision_mask: jax.Array  # bool
    segment_ids: jax.Array  # int32
    position_ids: jax.Array  # int32
    targets: jax.Array  # int32
    target_vision: jax.Array  # bool
    target_weights: jax.Array  # float32


def make_batch(rows: list[Arrays], orders: list[Int32[np.ndarray, " length"]] | None = None) -> Batch:
    """Rows with their targets, each in its order of tokens (as they lie, by default)."""

    def stack(name: Literal["tokens", "vision_mask", "segment_ids", "position_ids", "loss_weights"], shift: int) -> Any:
        arrays: np.ndarray = np.stack([row[name] for row in rows])
        if shift:
            arrays = np.concatenate([arrays[:, 1:], np.zeros_like(arrays[:, :1])], axis=1)
        return arrays if orders is None else np.stack([a[order] for a, order in zip(arrays, orders, strict=True)])

    return Batch(
        tokens=stack("tokens", 0),
        vision_mask=stack("vision_mask", 0),
        segment_ids=stack("segment_ids", 0),
        position_ids=stack("position_ids", 0),
        targets=stack("tokens", 1),
        target_vision=stack("vision_mask", 1),
        target_weights=stack("loss_weights", 1),
    )


def put_on_mesh(batch: Batch, mesh: Mesh) -> Batch:
    """The batch as global arrays: rows over dp and fsdp, tokens over sp."""
    where = sharding(mesh, "batch", "length")
    return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, where, lambda index: a[index]), batch)
