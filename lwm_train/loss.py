"""Cross-entropy of both heads in chunks of tokens; the gradient is made in the forward pass.

    loss = sum over tokens of coefficient * ce,
    coefficient = weight / sum(weights)                                     without shares
                = share_m * weight / sum(weights of modality m)             with shares: text 0.5, vision 0.5

With `z_loss` z each token's ce gets z * log(sum(exp(logits)))^2 added, which keeps logits near 0; what is reported is
ce alone.

Logits exist for CHUNK tokens at a time: at 1M tokens a row's would be 170 GB. Since the loss is linear in the
coefficients and they do not depend on the parameters, d loss / d hidden and d loss / d head are made beside the
loss, chunk by chunk, and the backward pass only scales them. A chunk without a target of one modality skips
that head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from lwm_train.batch import Batch
from lwm_train.config import Shares

CHUNK = 512  # tokens whose logits exist at a time


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ModalitySums:
    """Sums over the global batch, for text and for vision; each float32[2]."""

    weighted_ce: jax.Array
    weights: jax.Array
    ce: jax.Array  # of trained tokens, each counted once
    num_trained: jax.Array
    num_correct: jax.Array


def loss_and_sums(
    hidden_BLD: jax.Array,
    text_head_DV: jax.Array,
    vision_head_DV: jax.Array,
    batch: Batch,
    shares: Shares | None = None,
    mesh: Mesh | None = None,
    *,
    z_loss: float = 0.0,
    of_total: jax.Array | None = None,
) -> tuple[jax.Array, ModalitySums]:
    """The scalar to minimise, and what to report (not differentiated).

    of_total: `weight_totals` of the batch that this one is a part of; losses and sums of all parts add up to the
    whole's. By default it is the whole.
    """
    weights_BL = batch.target_weights.astype(jnp.promote_types(jnp.float32, hidden_BLD.dtype))
    is_vision_BL = batch.target_vision
    own_total = weight_totals(batch, weights_BL.dtype)
    total = own_total if of_total is None else of_total
    if shares is None:
        scale = jnp.broadcast_to(1 / jnp.maximum(total.sum(), 1e-30), (2,))
    else:
        share = jnp.array([shares.text, shares.vision], total.dtype) * (total > 0)  # an absent modality has no share
        scale = share / jnp.maximum(share.sum(), 1e-30) / jnp.maximum(total, 1e-30)
    coefficients_BL = weights_BL * jnp.where(is_vision_BL, scale[1], scale[0])
    weighted_loss, sums = _cross_entropy(
        hidden_BLD, text_head_DV, vision_head_DV, batch.targets, is_vision_BL, weights_BL, coefficients_BL, mesh, z_loss
    )
    ce = jax.lax.stop_gradient(sums)
    return weighted_loss, ModalitySums(ce[0], own_total, ce[1], ce[2], ce[3])


def weight_totals(batch: Batch, dtype: Any = jnp.float32) -> jax.Array:
    """Sums of the batch's target weights, of text and of vision; [2]."""
    weights_BL = batch.target_weights.astype(dtype)
    return jnp.stack([jnp.sum(weights_BL * ~batch.target_vision), jnp.sum(weights_BL * batch.target_vision)])


@partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _cross_entropy(
    hidden: jax.Array, text_head: jax.Array, vision_head: jax.Array, targets: jax.Array, is_vision: jax.Array,
    weights: jax.Array, coefficients: jax.Array, mesh: Mesh | None, z_loss: float,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(sum of coefficient * ce, sums[4, 2]); differentiable in hidden and the heads."""
    loss, sums = _on_mesh(
        hidden, text_head, vision_head, targets, is_vision, weights, coefficients, mesh, z_loss, with_gradient=False
    )
    return loss, sums


def _forward(*args: Any) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    loss, sums, d_hidden, d_text, d_vision = _on_mesh(*args, with_gradient=True)
    return (loss, sums), (d_hidden, d_text, d_vision)


def _backward(mesh: Mesh | None, z_loss: float, gradients: tuple[jax.Array, ...], cotangents: Any) -> tuple[Any, ...]:
    scale = cotangents[0]
    return (*((scale * g).astype(g.dtype) for g in gradients), None, None, None, None)


_cross_entropy.defvjp(_forward, _backward)


def _on_mesh(
    hidden: jax.Array, text_head: jax.Array, vision_head: jax.Array, targets: jax.Array, is_vision: jax.Array,
    weights: jax.Array, coefficients: jax.Array, mesh: Mesh | None, z_loss: float, *, with_gradient: bool,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Each device sums over its own tokens and its own part of the vocabulary; then the sums meet."""
    if mesh is None:
        arrays = (hidden, text_head, vision_head, targets, is_vision, weights, coefficients)
        return _local(*arrays, axes=(), tp=1, z_loss=z_loss, with_gradient=with_gradient)
    tokens = PartitionSpec(("dp", "fsdp"), "sp")
    head = PartitionSpec(None, "tp")
    tp = mesh.shape["tp"]
    if text_head.shape[1] % tp or vision_head.shape[1] % tp:
        raise ValueError(
            f"mesh: tp {tp} does not divide vocabularies of {text_head.shape[1]} and {vision_head.shape[1]}"
        )
    local = partial(_local, axes=("dp", "fsdp", "sp"), tp=tp, z_loss=z_loss, with_gradient=with_gradient)
    out = (PartitionSpec(), PartitionSpec()) + ((tokens, head, head) if with_gradient else ())
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(tokens, head, head, tokens, tokens, tokens, tokens),
        out_specs=out,
        check_vma=False,
    )(hidden, text_head, vision_head, targets, is_vision, weights, coefficients)


def _local(
    hidden: jax.Array, text_head: jax.Array, vision_head: jax.Array, targets: jax.Array, is_vision: jax.Array,
    weights: jax.Array, coefficients: jax.Array, axes: tuple[str, ...], tp: int, z_loss: float, with_gradient: bool,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """One device's tokens, CHUNK at a time."""
    shape = hidden.shape
    num_tokens = shape[0] * shape[1]
    chunk = min(CHUNK, num_tokens)
    pad = -num_tokens % chunk
    wide = coefficients.dtype

    def chunks(x: jax.Array) -> jax.Array:
        x = x.reshape(num_tokens, *x.shape[2:])
        return jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, chunk, *x.shape[1:])

    def one_head(
        head: jax.Array, d_head: jax.Array, h: jax.Array, target: jax.Array, weight: jax.Array, coef: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Sums[5] of the tokens that have a weight, d hidden of the chunk, d head so far."""

        def run() -> tuple[jax.Array, jax.Array, jax.Array]:
            logits = jnp.dot(h, head, preferred_element_type=wide)  # [chunk, V / tp]
            first = jax.lax.axis_index("tp") * logits.shape[1] if tp > 1 else 0
            top = jnp.max(logits, axis=1)
            top = jax.lax.pmax(top, "tp") if tp > 1 else top
            unnormed = jnp.exp(logits - top[:, None])
            partition = jnp.sum(unnormed, axis=1)
            column = target - first
            mine = (column >= 0) & (column < logits.shape[1])
            column = jnp.clip(column, 0, logits.shape[1] - 1)
            picked = jnp.where(mine, jnp.take_along_axis(logits, column[:, None], axis=1)[:, 0], 0)
            if tp > 1:
                partition, picked = jax.lax.psum((partition, picked), "tp")
            lse = jnp.log(partition) + top
            ce = lse - picked
            trained = weight > 0
            sums = jnp.stack(
                [
                    jnp.sum(weight * ce),
                    jnp.sum(trained * ce),
                    jnp.sum(trained, dtype=wide),
                    jnp.sum(trained & (picked >= top), dtype=wide),
                    jnp.sum(coef * (ce + z_loss * lse * lse)) if z_loss else jnp.sum(coef * ce),
                ]
            )
            if not with_gradient:
                return sums, jnp.zeros_like(h), d_head
            pull = coef * (1 + 2 * z_loss * lse) if z_loss else coef  # of ce + z lse^2 on lse
            d_logits = unnormed * (pull / partition)[:, None]
            d_logits = d_logits.at[jnp.arange(chunk), column].add(-coef * mine).astype(h.dtype)
            d_h = jnp.dot(d_logits, head.T, preferred_element_type=wide).astype(h.dtype)
            return sums, d_h, d_head + jnp.dot(h.T, d_logits, preferred_element_type=wide)

        return jax.lax.cond(jnp.any(weight > 0), run, lambda: (jnp.zeros(5, wide), jnp.zeros_like(h), d_head))

    def step(carry: Any, x: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        sums, d_text, d_vision = carry
        h, target, vision, weight, coef = x
        text_sums, d_h_text, d_text = one_head(text_head, d_text, h, target, weight * ~vision, coef * ~vision)
        vision_sums, d_h_vision, d_vision = one_head(vision_head, d_vision, h, target, weight * vision, coef * vision)
        return (sums + jnp.stack([text_sums, vision_sums], axis=1), d_text, d_vision), d_h_text + d_h_vision

    text_head, vision_head = text_head.astype(hidden.dtype), vision_head.astype(hidden.dtype)
    start = (jnp.zeros((5, 2), wide), jnp.zeros(text_head.shape, wide), jnp.zeros(vision_head.shape, wide))
    xs = tuple(map(chunks, (hidden, targets, is_vision, weights, coefficients)))
    (sums, d_text, d_vision), d_hidden = jax.lax.scan(step, start, xs)
    if axes:
        sums = jax.lax.psum(sums, axes)
    if not with_gradient:
        return sums[4].sum(), sums[:4]
    d_hidden = d_hidden.reshape(-1, shape[2])[:num_tokens].reshape(shape)
    if axes:
        d_text, d_vision = jax.lax.psum((d_text, d_vision), axes)
        d_hidden = jax.lax.psum(d_hidden, "tp") if tp > 1 else d_hidden
    return sums[4].sum(), sums[:4], d_hidden, d_text, d_vision
