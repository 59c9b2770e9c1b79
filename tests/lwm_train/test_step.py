"""Gradient accumulation, skipped steps and what the optimizer moves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
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
from lwm_train.metrics import METRICS, MetricsLog
from lwm_train.model import init_params
from lwm_train.optimizer import make_optimizer
from lwm_train.step import init_state, make_train_step
from tests.lwm_train.rows import packed_rows, random_examples

VOCABULARY, LENGTH = 64, 32
CONFIG = ModelConfig(16, 24, 2, 2, 2, text_vocab_size=VOCABULARY, vision_vocab_size=VOCABULARY)
ONE = MeshSpec()


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
    return state, batch, make_train_step(config, optimizer, loss, mesh, accumulate).lower(state, batch).compile()


@pytest.mark.parametrize("shares", [None, Shares(text=0.5, vision=0.5)], ids=["no-shares", "half-and-half"])
@pytest.mark.usefixtures("float64")
def test_accumulated_steps_equal_the_whole_step(shares: Shares | None) -> None:
    """The optimizer subtracts the gradient itself, so parameters tell it."""
    config = dataclasses.replace(CONFIG, dtype="float64")
    loss = LossSpec(shares=shares, z_loss=1e-3)

    def one_step(spec: MeshSpec, accumulate: int) -> Any:
        state, batch, step = compiled(config, optax.sgd(1.0), loss, spec, accumulate)
        state, report = step(state, batch)
        return jax.tree.map(np.asarray, (state.params, report.loss, report.sums, report.grad_norm))

    wanted = one_step(ONE, 1)
    for spec, accumulate in [(ONE, 2), (ONE, 8), (MeshSpec(fsdp=2, sp=2), 4)]:
        for a, b in zip(jax.tree.leaves(one_step(spec, accumulate)), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * np.abs(b).max())


def test_memory_falls_with_the_parts_of_a_batch() -> None:
    def temp(accumulate: int) -> int:
        config = dataclasses.replace(CONFIG, ffn_dim=512, remat="none")
        step = compiled(config, optax.sgd(1.0), LossSpec(), ONE, accumulate)[2]
        return int(step.memory_analysis().temp_size_in_bytes)

    assert temp(4) < 0.6 * temp(1)


def test_parts_that_do_not_divide_over_the_mesh_are_refused() -> None:
    with pytest.raises(ValueError, match=r"accumulate: got 4 for batches of 8 rows; .* dp x fsdp = 4"):
        compiled(CONFIG, optax.sgd(1.0), LossSpec(), MeshSpec(dp=2, fsdp=2), 4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_skipped_step_leaves_parameters_and_moments_bit_for_bit(name: Any) -> None:
    spec = OptimizerSpec(name=name, adam_lr=1e-2 if name == "muon" else None, lr=1e-2, warmup=3, skip_nonfinite=2)
    state, good, step = compiled(CONFIG, make_optimizer(spec, 10), LossSpec(), ONE, 1)
    bad = dataclasses.replace(good, target_weights=good.target_weights.at[0, 3].set(jnp.nan))
    state, _ = step(state, good)
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
            "data": [{"dataset": str(tmp_path)}], "batch_rows": 8, "steps": 10, "optimizer": {"skip_nonfinite": 2},
        }
    )  # fmt: skip
    state, good, step = compiled(CONFIG, make_optimizer(manifest.optimizer, 10), LossSpec(), ONE, 1)
    bad = dataclasses.replace(good, target_weights=good.target_weights.at[0, 3].set(jnp.nan))
    with MetricsLog(manifest, tmp_path, LENGTH) as log:
        for number, batch in enumerate([bad, good, bad], start=1):
            state, report = step(state, batch)
            assert ("skipped" in log.write(number, report, 0.0)) == (batch is bad)
        state, report = step(state, bad)
        with pytest.raises(RunFailed, match="step 4"):
            log.write(4, report, 0.0)
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [1, 1, 2, 3]
    assert [line["loss"] is None for line in lines] == [True, False, True, True]


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_decay_reaches_what_the_manifest_says(decay: Any) -> None:
    params = init_params(CONFIG, jax.random.key(0))
    optimizer = make_optimizer(OptimizerSpec(lr=0.5, schedule="constant", weight_decay=0.1, decay=decay), 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates.layers.w1, -0.05 * params.layers.w1, rtol=1e-6)
    np.testing.assert_allclose(updates.text_embedding, -0.05 * params.text_embedding, rtol=1e-6)
    norms = np.concatenate(
        [np.ravel(n) for n in (updates.layers.attention_norm, updates.layers.ffn_norm, updates.final_norm)]
    )
    np.testing.assert_allclose(norms, -0.05 if decay == "all" else 0, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_bf16_moments_are_the_first_ones_and_move_nearly_the_same(name: Any) -> None:
    params = init_params(CONFIG, jax.random.key(0))
    grads = jax.tree.map(lambda p: p + 0.01, params)
    updates, dtypes = {}, {}
    for moments in ("fp32", "bf16"):
        spec: Any = {"name": name, "lr": 0.1, "schedule": "constant", "moments": moments}
        optimizer = make_optimizer(OptimizerSpec(**spec, adam_lr=0.1 if name == "muon" else None), 10)
        state = optimizer.init(params)
        for _ in range(2):
            updates[moments], state = optimizer.update(grads, state, params)
        paths = [(jax.tree_util.keystr(path), leaf.dtype) for path, leaf in jax.tree.leaves_with_path(state)]
        dtypes[moments] = {(".mu" in path, str(dtype)) for path, dtype in paths if ".mu" in path or ".nu" in path}
    assert dtypes == {"fp32": {(True, "float32"), (False, "float32")}, "bf16": {(True, "bfloat16"), (False, "float32")}}
    for a, b in zip(jax.tree.leaves(updates["bf16"]), jax.tree.leaves(updates["fp32"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.03, atol=0.03 * np.abs(b).max())
