"""TrainState and the two compiled functions of it: train_step and eval_step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    """What a step tells: its loss, sums by modality, the norm of its gradient before the clip."""

    loss: jax.Array
    sums: ModalitySums
    grad_norm: jax.Array


def init_state(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """A fresh state, made where it will lie."""

    def make() -> TrainState:
        params = init_params(config, jax.random.key(seed))
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return jax.jit(make, out_shardings=state_shardings(jax.eval_shape(make), mesh))()


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Where each leaf of the state lies: moments like their parameter, counters everywhere."""
    params = tree_shardings(mesh, LOGICAL_AXES, state.params)
    return TrainState(sharding(mesh), params, _opt_shardings(state, params, mesh))


def make_train_step(
    config: ModelConfig, optimizer: optax.GradientTransformation, shares: Shares | None, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, StepReport]]:
    """The compiled step; the state given to it is donated."""

    def loss_fn(params: Params, batch: Batch) -> tuple[jax.Array, ModalitySums]:
        hidden = forward(
            params, config, batch.tokens, batch.vision_mask, batch.segment_ids, batch.position_ids, mesh
        )
        return loss_and_sums(hidden, params.text_head, params.vision_head, batch, shares, mesh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepReport]:
        (loss, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), StepReport(loss, sums, optax.tree.norm(grads))

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(config: ModelConfig, mesh: Mesh) -> Callable[[Params, Batch], ModalitySums]:
    """The compiled sums of a batch under fixed parameters."""

    @jax.jit
    def eval_step(params: Params, batch: Batch) -> ModalitySums:
        hidden = forward(
            params, config, batch.tokens, batch.vision_mask, batch.segment_ids, batch.position_ids, mesh
        )
        return loss_and_sums(hidden, params.text_head, params.vision_head, batch, None, mesh)[1]

    return eval_step


def _opt_shardings(state: TrainState, params: Params, mesh: Mesh) -> Any:
    """The optimizer's state: every subtree shaped like the parameters lies as they do."""
    tree = jax.tree.structure(state.params)
    return jax.tree.map(
        lambda part: params if jax.tree.structure(part) == tree else sharding(mesh),
        state.opt_state,
        is_leaf=lambda part: jax.tree.structure(part) == tree,
    )
