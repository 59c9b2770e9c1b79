"""TrainState and the two compiled functions of it: train_step and eval_step.

accumulate: 2         rows  0 1 2 3 4 5 6 7        every device has rows in every part
  part 0                    0   2   4   6          gradients and sums of the parts add up to the whole batch's,
  part 1                      1   3   5   7        since each part knows the whole batch's weights
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lwm_train.batch import Batch
from lwm_train.config import LossSpec, ModelConfig
from lwm_train.loss import ModalitySums, loss_and_sums, weight_totals
from lwm_train.mesh import constrain, sharding, tree_shardings
from lwm_train.model import LOGICAL_AXES, Params, forward, heads, init_params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step reads and writes. step: int32[], steps done."""

    step: jax.Array
    params: Params
    opt_state: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepReport:
    """What a step tells: its loss, sums by modality, the norm of its gradient before the clip.

    is_finite: bool[], that neither loss, gradient nor the parameters after the step hold NaN or infinity.
    num_skipped, skipped_in_a_row: int32[], steps of the run so far, this one too, that left parameters and moments
    as they were because their gradient was not finite (0 where the optimizer does not skip).
    """

    loss: jax.Array
    sums: ModalitySums
    grad_norm: jax.Array
    is_finite: jax.Array
    num_skipped: jax.Array
    skipped_in_a_row: jax.Array


def init_state(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """A fresh state, made where it will lie."""
    where = jax.tree.map(lambda leaf: leaf.sharding, state_layout(config, optimizer, mesh))
    return jax.jit(partial(_make_state, config, optimizer, seed), out_shardings=where)()


def state_layout(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state's tree with a jax.ShapeDtypeStruct for each leaf: moments lie like their parameter, counters
    everywhere."""
    shapes = jax.eval_shape(partial(_make_state, config, optimizer, 0))
    params = tree_shardings(mesh, LOGICAL_AXES, shapes.params)
    state_tree: Any = TrainState
    where = state_tree(sharding(mesh), params, _like_params(shapes.opt_state, params, sharding(mesh)))
    return jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), shapes, where)


def _make_state(config: ModelConfig, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    params = init_params(config, jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def _like_params(opt_state: Any, params: Params, elsewhere: Any) -> Any:
    """For each leaf of the optimizer's state, the value of the parameter whose path its own path ends with."""
    values = {jax.tree_util.keystr(path): value for path, value in jax.tree.leaves_with_path(params)}

    def one(path: tuple[Any, ...], _: Any) -> Any:
        ends = (jax.tree_util.keystr(path[n:]) for n in range(len(path)))
        return next((values[end] for end in ends if end in values), elsewhere)

    return jax.tree.map_with_path(one, opt_state)


def make_train_step(
    config: ModelConfig, optimizer: optax.GradientTransformation, loss: LossSpec, mesh: Mesh, accumulate: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, StepReport]]:
    """The compiled step; the state given to it is donated.

    accumulate: parts of the batch that are computed one after the other, so that activations of one exist at a time.
    ValueError, when it is first called, where a part's rows do not divide over the mesh.
    """

    def loss_fn(params: Params, batch: Batch, of_total: jax.Array) -> tuple[jax.Array, ModalitySums]:
        hidden = forward(params, config, batch.tokens, batch.vision_mask, batch.segment_ids, batch.position_ids, mesh)
        return loss_and_sums(hidden, *heads(params), batch, loss.shares, mesh, z_loss=loss.z_loss, of_total=of_total)

    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def accumulated(params: Params, batch: Batch) -> tuple[tuple[jax.Array, ModalitySums], Params]:
        total = weight_totals(batch, jnp.promote_types(jnp.float32, config.dtype))
        if accumulate == 1:
            return gradient(params, batch, total)
        parts = jax.tree.map(partial(_cut_rows, accumulate=accumulate, mesh=mesh), batch)
        shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], parts), total)
        zeros = jax.tree.map(lambda of: jnp.zeros(of.shape, of.dtype), shapes)
        zeros = (zeros[0], jax.lax.with_sharding_constraint(zeros[1], tree_shardings(mesh, LOGICAL_AXES, params)))

        def add_part(sums: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, gradient(params, part, total)), None

        return jax.lax.scan(add_part, zeros, parts)[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepReport]:
        (value, sums), grads = accumulated(state.params, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        grad_norm = optax.tree.norm(grads)
        is_finite = jnp.isfinite(value) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(params))
        report = StepReport(value, sums, grad_norm, is_finite, *_num_skipped(opt_state))
        return TrainState(state.step + 1, params, opt_state), report

    return jax.jit(train_step, donate_argnums=0)


def _cut_rows(x_RL: jax.Array, accumulate: int, mesh: Mesh) -> jax.Array:
    """[accumulate, R / accumulate, L]; part i has rows i, i + accumulate, ..., so no row leaves its device."""
    rows, spread = len(x_RL), mesh.shape["dp"] * mesh.shape["fsdp"]
    if rows % (accumulate * spread):
        raise ValueError(
            f"accumulate: got {accumulate} for batches of {rows} rows; wanted parts whose rows are a multiple of "
            f"dp x fsdp = {spread}"
        )
    parts = x_RL.reshape(rows // accumulate, accumulate, -1).swapaxes(0, 1)
    return constrain(parts, mesh, None, "batch", "length")


def _num_skipped(opt_state: Any) -> tuple[jax.Array, jax.Array]:
    if isinstance(opt_state, optax.ApplyIfFiniteState):
        return opt_state.total_notfinite, opt_state.notfinite_count
    return jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)


def make_eval_step(config: ModelConfig, mesh: Mesh) -> Callable[[Params, Batch], ModalitySums]:
    """The compiled sums of a batch under fixed parameters."""

    @jax.jit
    def eval_step(params: Params, batch: Batch) -> ModalitySums:
        hidden = forward(params, config, batch.tokens, batch.vision_mask, batch.segment_ids, batch.position_ids, mesh)
        return loss_and_sums(hidden, *heads(params), batch, None, mesh)[1]

    return eval_step
