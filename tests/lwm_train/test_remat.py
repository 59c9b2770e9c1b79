"""What is kept of a layer changes memory and work, and no gradient."""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from lwm_train.config import MeshSpec, ModelConfig
from lwm_train.mesh import make_mesh
from lwm_train.model import Params, forward, init_params
from lwm_train.remat import remat

ROWS, LENGTH, LAYERS = 2, 128, 6
CONFIG = ModelConfig(32, 96, LAYERS, 4, 4, text_vocab_size=20, vision_vocab_size=20)
POLICIES = ("none", "block", "save-attention", "offload")
TOKENS = np.random.default_rng(0).integers(0, 20, (ROWS, LENGTH)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), TOKENS.shape)


@cache
def compiled(policy: str, sp: int) -> Any:
    mesh = make_mesh(MeshSpec(sp=sp))
    config = dataclasses.replace(CONFIG, remat=policy)

    def loss(params: Params) -> jax.Array:
        hidden = forward(params, config, TOKENS, TOKENS < 10, np.ones_like(TOKENS), POSITIONS, mesh)
        return (hidden**3).sum()

    shapes = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
    return jax.jit(jax.grad(loss)).lower(shapes).compile({"xla_backend_optimization_level": 0})


@pytest.mark.parametrize("sp", [1, 4])
def test_gradients_are_the_same_whatever_is_kept(sp: int) -> None:
    params = init_params(CONFIG, jax.random.key(0))
    wanted = compiled("none", sp)(params)
    for policy in POLICIES[1:] if sp == 1 else ("block", "save-attention"):
        for a, b in zip(jax.tree.leaves(compiled(policy, sp)(params)), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max(), err_msg=policy)


def test_memory_is_ordered_as_the_names_say() -> None:
    none, block, save, _ = (compiled(policy, 1).memory_analysis().temp_size_in_bytes for policy in POLICIES)
    attention_result = ROWS * LENGTH * (CONFIG.dim + CONFIG.num_heads) * 4
    assert block + 0.8 * LAYERS * attention_result < save < block + 1.5 * LAYERS * attention_result
    assert save < none - LAYERS * ROWS * LENGTH * 2 * CONFIG.ffn_dim * 4  # at least the MLP's two products


def test_with_attention_saved_the_ring_goes_round_once_less() -> None:
    """The forward ring sends keys and values; in the backward pass only the backward ring is left."""

    def num_sends(policy: str) -> int:
        return len(re.findall(r"collective-permute(?:-start)?\(", compiled(policy, 4).as_text()))

    assert num_sends("save-attention") == num_sends("none") < num_sends("block")


def test_offload_sends_the_layers_inputs_to_the_hosts_memory() -> None:
    """On CPU host and device memory are one, and only the traced program tells them apart."""

    def block(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jax.numpy.tanh(x @ w), None

    def loss(w_LDD: jax.Array) -> jax.Array:
        return jax.lax.scan(remat("offload", block, None), jax.numpy.ones((3, 4)), w_LDD)[0].sum()

    assert "f32<host>[2,3,4]" in str(jax.make_jaxpr(jax.grad(loss))(jax.numpy.ones((2, 4, 4))))  # 2 layers' inputs


def test_offload_where_the_device_has_no_host_memory_names_the_remedy() -> None:
    device = SimpleNamespace(platform="abacus", addressable_memories=lambda: [SimpleNamespace(kind="device")])
    mesh: Any = SimpleNamespace(local_devices=[device])
    with pytest.raises(ValueError, match=r"offload: abacus devices have no pinned_host memory; take save-attention"):
        remat("offload", lambda x, layer: x, mesh)
    with pytest.raises(ValueError, match="remat: got 'all', wanted none, block"):
        remat("all", lambda x, layer: x, None)
