"""TrainState and the two compiled functions of it: train_step and eval_step."""

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
from lwm_train.config import ModelConfig, Shares
from lwm_train.loss import ModalitySums, loss_and_sums
from lwm_train.mesh import sharding, tree_shardings
from lwm_train.model import LOGICAL_AXES, Params, forward, init_params


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
    """

    loss: jax.Array
    sums: ModalitySums
    grad_norm: jax.Array
    is_finite: jax.Array


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
    config: ModelConfig, optimizer: optax.GradientTransformation, shares: Shares | None, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, StepReport]]:
    """The compiled step; the state given to it is donated."""

    def loss_fn(params: Params, batch: Batch) -> tuple[jax.Array, ModalitySums]:
        hidden = forward(params, config, batch.tokens, batch.vision_mask, batch.segment_ids, batch.position_ids, mesh)
        return loss_and_sums(hidden, params.text_head, params.vision_head, batch, shares, mesh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepReport]:
        (loss, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        grad_norm = optax.tree.norm(grads)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(params))
        return TrainState(state.step + 1, params, opt_state), StepReport(loss, sums, grad_norm, is_finite)

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(config: ModelConfig, mesh: Mesh) -> Callable[[Params, Batch], ModalitySums]:
    """The compiled sums of a batch under fixed parameters."""

    @jax.jit
    def eval_step(params: Params, batch: Batch) -> ModalitySums:
        hidden = forward(params, config, batch.tokens, batch.vision_mask, batch.segment_ids, batch.position_ids, mesh)
        return loss_and_sums(hidden, params.text_head, params.vision_head, batch, None, mesh)[1]

    return eval_step
