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

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float32, Int32

from lwm_data.format.packed import Arrays
from lwm_train.mesh import sharding


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """B rows of L tokens; numpy on the host, jax arrays on the mesh."""

    tokens: Int32[np.ndarray, "rows length"]
    vision_mask: Bool[np.ndarray, "rows length"]
    segment_ids: Int32[np.ndarray, "rows length"]
    position_ids: Int32[np.ndarray, "rows length"]
    targets: Int32[np.ndarray, "rows length"]
    target_vision: Bool[np.ndarray, "rows length"]
    target_weights: Float32[np.ndarray, "rows length"]


def make_batch(rows: list[Arrays], orders: list[Int32[np.ndarray, " length"]] | None = None) -> Batch:
    """Rows with their targets, each in its order of tokens (as they lie, by default)."""

    def stack(name: str, shift: int) -> np.ndarray:
        arrays: np.ndarray = np.stack([row[name] for row in rows])  # type: ignore[literal-required]
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
