"""Gradient accumulation, skipped steps and what the optimizer moves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lwm_data.terminal import RunFailed
from lwm_train.batch import Batch, make_batch, put_on_mesh
from lwm_train.config import LossSpec, MeshSpec, ModelConfig, OptimizerSpec, Shares, TrainManifest
from lwm_train.mesh import make_mesh
from lwm_train.metrics import METRICS, MetricsLog, StepTimes
from lwm_train.model import init_params
from lwm_train.optimizer import make_optimizer
from lwm_train.step import init_state, make_train_step
from tests.lwm_train.rows import packed_rows, random_examples

VOCABULARY, LENGTH = 64, 32
CONFIG = ModelConfig(16, 24, 2, 2, 2, text_vocab_size=VOCABULARY, vision_vocab_size=VOCABULARY)
ONE = MeshSpec()
SKIPS = OptimizerSpec(lr=1e-2, warmup=3, skip_nonfinite=2)


@pytest.fixture
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def small_batch(seed: int = 0) -> Batch:
    examples = random_examples(np.random.default_rng(seed), 20, 12, VOCABULARY)
    batch = make_batch(packed_rows(examples, LENGTH, 8, "example"))
    return dataclasses.replace(batch, tokens=batch.tokens % VOCABULARY, targets=batch.targets % VOCABULARY)


def compiled(config: ModelConfig, optimizer: Any, loss: LossSpec, spec: MeshSpec, accumulate: int) -> Any:
    """(state, batch) of the mesh, and the compiled step."""
    mesh = make_mesh(spec)
    state = init_state(config, optimizer, mesh, seed=0)
    batch = put_on_mesh(small_batch(), mesh)
    lowered = make_train_step(config, optimizer, loss, mesh, accumulate).lower(state, batch)
    return state, batch, lowered.compile({"xla_backend_optimization_level": 0})


@cache
def one_step(spec: MeshSpec, accumulate: int) -> tuple[Any, int]:
    """What a step gives, and its temporary memory. The optimizer subtracts the gradient itself: parameters tell it."""
    config = dataclasses.replace(CONFIG, dtype="float64")
    loss = LossSpec(shares=Shares(text=0.5, vision=0.5), z_loss=1e-3)
    state, batch, step = compiled(config, optax.sgd(1.0), loss, spec, accumulate)
    state, report = step(state, batch)
    result = jax.tree.map(np.asarray, (state.params, report.loss, report.sums, report.grad_norm))
    return result, step.memory_analysis().temp_size_in_bytes


@pytest.mark.usefixtures("float64")
def test_accumulated_steps_equal_the_whole_step() -> None:
    wanted, _ = one_step(ONE, 1)
    for spec, accumulate in [(ONE, 4), (MeshSpec(fsdp=2, tp=2), 2)]:
        for a, b in zip(jax.tree.leaves(one_step(spec, accumulate)[0]), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * np.abs(b).max())


@pytest.mark.usefixtures("float64")
def test_memory_falls_with_the_parts_of_a_batch() -> None:
    assert one_step(ONE, 4)[1] < 0.6 * one_step(ONE, 1)[1]


def test_parts_that_do_not_divide_over_the_mesh_are_refused() -> None:
    with pytest.raises(ValueError, match=r"accumulate: got 4 for batches of 8 rows; .* dp x fsdp = 4"):
        compiled(CONFIG, optax.sgd(1.0), LossSpec(), MeshSpec(dp=2, fsdp=2), 4)


@cache
def skipping_step() -> Any:
    """The compiled step of SKIPS, a fresh state, a good batch and one with a NaN in it."""
    optimizer = make_optimizer(SKIPS, 10)
    _, good, step = compiled(CONFIG, optimizer, LossSpec(), ONE, 1)
    bad = dataclasses.replace(good, target_weights=good.target_weights.at[0, 3].set(jnp.nan))
    return step, lambda: init_state(CONFIG, optimizer, make_mesh(ONE), seed=0), good, bad


def test_a_skipped_step_leaves_parameters_and_moments_bit_for_bit() -> None:
    step, fresh, good, bad = skipping_step()
    state, _ = step(fresh(), good)
    before = jax.tree.map(np.asarray, (state.params, state.opt_state.inner_state))
    for number in (1, 2):
        state, report = step(state, bad)
        assert (int(report.num_skipped), int(report.skipped_in_a_row)) == (number, number)
        after = jax.tree.map(np.asarray, (state.params, state.opt_state.inner_state))
        jax.tree.map(np.testing.assert_array_equal, after, before)
    state, report = step(state, good)
    assert (int(report.num_skipped), int(report.skipped_in_a_row)) == (2, 0)
    assert int(state.step) == 4 and bool(report.is_finite)
    assert not np.array_equal(np.asarray(state.params.layers.wq), before[0].layers.wq)


def test_a_run_notes_skipped_steps_and_stops_after_so_many_in_a_row(tmp_path: Path) -> None:
    manifest = TrainManifest.model_validate(
        {
            "kind": "train", "name": "made", "out": str(tmp_path), "model": {"preset": "tiny"},
            "data": [{"dataset": str(tmp_path)}], "batch_rows": 8, "steps": 10, "optimizer": SKIPS,
        }
    )  # fmt: skip
    step, fresh, good, bad = skipping_step()
    state = fresh()
    work, times = (jnp.float32(100), jnp.float32(1000)), StepTimes(1.0, False, 0.0, 1.0)
    with MetricsLog(manifest, CONFIG, make_mesh(ONE), tmp_path, LENGTH) as log:
        for number, batch in enumerate([bad, good, bad], start=1):
            state, report = step(state, batch)
            assert ("skipped" in log.write(number, report, work, times, None)) == (batch is bad)
        state, report = step(state, bad)
        with pytest.raises(RunFailed, match="step 4"):
            log.write(4, report, work, times, None)
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [1, 1, 2, 3]
    assert [line["loss"] is None for line in lines] == [True, False, True, True]


@cache
def fresh_params() -> Any:
    return jax.jit(lambda: init_params(CONFIG, jax.random.key(0)))()


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_decay_reaches_what_the_manifest_says(decay: Any) -> None:
    params = fresh_params()
    optimizer = make_optimizer(OptimizerSpec(lr=0.5, schedule="constant", weight_decay=0.1, decay=decay), 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates.layers.w1, -0.05 * params.layers.w1, rtol=1e-6)
    np.testing.assert_allclose(updates.text_embedding, -0.05 * params.text_embedding, rtol=1e-6)
    norms = np.concatenate(
        [np.ravel(n) for n in (updates.layers.attention_norm, updates.layers.ffn_norm, updates.final_norm)]
    )
    np.testing.assert_allclose(norms, -0.05 if decay == "all" else 0, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_first_moments_are_stored_in_bf16(name: Any) -> None:
    params = fresh_params()
    for moments, wanted in (("fp32", "float32"), ("bf16", "bfloat16")):
        spec = OptimizerSpec(name=name, lr=0.1, adam_lr=0.1 if name == "muon" else None, moments=moments)
        state = jax.eval_shape(make_optimizer(spec, 10).init, params)
        stored = [(jax.tree_util.keystr(path), str(leaf.dtype)) for path, leaf in jax.tree.leaves_with_path(state)]
        assert {dtype for path, dtype in stored if ".mu" in path} == {wanted}
        assert {dtype for path, dtype in stored if ".nu" in path} == {"float32"}


def test_bf16_moments_move_nearly_the_same() -> None:
    params = fresh_params()
    grads = jax.tree.map(lambda p: p + 0.01, params)

    def second_update(moments: Any) -> Any:
        optimizer = make_optimizer(OptimizerSpec(lr=0.1, schedule="constant", moments=moments), 10)
        _, state = optimizer.update(grads, optimizer.init(params), params)
        return optimizer.update(grads, state, params)[0]

    got, wanted = jax.jit(lambda: (second_update("bf16"), second_update("fp32")))()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.03, atol=0.03 * np.abs(b).max())
