"""A step is the same on every mesh of simulated devices, in float64 so that only the order of sums may differ."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from lwm_train.batch import Batch, make_batch, put_on_mesh
from lwm_train.config import LossSpec, MeshSpec, ModelConfig, OptimizerSpec, Shares
from lwm_train.mesh import make_mesh, tree_shardings
from lwm_train.model import LOGICAL_AXES
from lwm_train.optimizer import make_optimizer
from lwm_train.step import init_state, make_train_step, state_layout
from tests.lwm_train.rows import packed_rows, random_examples

TEXT, VISION, LENGTH = 136, 152, 32
CONFIG = ModelConfig(16, 24, 2, 8, 8, text_vocab_size=TEXT, vision_vocab_size=VISION, dtype="float64")
LOSS = LossSpec(shares=Shares(text=0.5, vision=0.5), z_loss=1e-3)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def small_batch() -> Batch:
    """8 packed rows whose codes are those of a small vision vocabulary."""
    batch = make_batch(packed_rows(random_examples(np.random.default_rng(0), 20, 12, TEXT), LENGTH, 8, "example"))
    return dataclasses.replace(batch, tokens=batch.tokens % TEXT, targets=batch.targets % TEXT)


@cache
def first_state() -> Any:
    state = init_state(CONFIG, make_optimizer(OptimizerSpec(), 10), make_mesh(MeshSpec()), seed=0)
    return jax.tree.map(np.asarray, state)


@cache
def two_steps(spec: MeshSpec) -> tuple[list[float], list[np.ndarray], str]:
    """Losses, parameters afterwards, and the compiled program."""
    mesh, optimizer = make_mesh(spec), make_optimizer(OptimizerSpec(lr=1e-2, schedule="constant"), 10)
    layout = state_layout(CONFIG, optimizer, mesh)
    state = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), first_state(), layout)
    batch = put_on_mesh(small_batch(), mesh)
    step = (
        make_train_step(CONFIG, optimizer, LOSS, mesh)
        .lower(state, batch)
        .compile({"xla_backend_optimization_level": 0})
    )
    losses = []
    for _ in range(2):
        state, report = step(state, batch)
        losses.append(float(report.loss))
    return losses, [np.asarray(leaf) for leaf in jax.tree.leaves(state.params)], step.as_text()


MESHES = [MeshSpec(fsdp=-1), MeshSpec(tp=8), MeshSpec(sp=8), MeshSpec(fsdp=2, tp=2, sp=2)]  # -1: all 8


@pytest.mark.parametrize("spec", MESHES, ids=["fsdp", "tp", "sp", "fsdp-tp-sp"])
def test_losses_and_parameters_of_two_steps_are_those_of_one_device(spec: MeshSpec) -> None:
    losses, params, _ = two_steps(MeshSpec())
    other_losses, other_params, _ = two_steps(spec)
    np.testing.assert_allclose(other_losses, losses, rtol=1e-12)
    for a, b in zip(other_params, params, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8 * np.abs(b).max())


def test_muon_moves_spread_parameters_as_it_moves_whole_ones() -> None:
    """Its orthogonal steps mix all of a matrix, whose parts lie on different devices."""
    optimizer = make_optimizer(OptimizerSpec(name="muon", lr=1e-2, adam_lr=1e-2), 10)
    params = first_state().params
    grads = jax.tree.map(lambda p: p + 0.01, params)
    update = jax.jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params)[0])
    where = tree_shardings(make_mesh(MeshSpec(fsdp=4, tp=2)), LOGICAL_AXES, params)
    spread = update(*(jax.tree.map(jax.device_put, tree, where) for tree in (grads, params)))
    for a, b in zip(jax.tree.leaves(spread), jax.tree.leaves(update(grads, params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("spec", [MeshSpec(tp=8), MeshSpec(fsdp=2, tp=2, sp=2)], ids=["tp", "fsdp-tp-sp"])
def test_no_device_ever_holds_the_whole_vocabulary(spec: MeshSpec) -> None:
    """Neither a table, nor a head, nor its gradient: over fsdp only its own part of the vocabulary is gathered."""
    text = two_steps(spec)[2]
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f(?:32|64)\[([\d,]+)\]", text)}
    assert any(TEXT // spec.tp in shape for shape in shapes)
    assert not [shape for shape in shapes if TEXT in shape or VISION in shape]
