"""The model against Hugging Face's LLaMA, and on meshes of simulated devices."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lwm_train.batch import make_batch, put_on_mesh
from lwm_train.config import LossSpec, MeshSpec, ModelConfig, OptimizerSpec
from lwm_train.mesh import make_mesh
from lwm_train.model import Params, forward, init_params, num_params
from lwm_train.optimizer import make_optimizer
from lwm_train.step import init_state, make_train_step
from tests.lwm_train.rows import packed_rows, random_examples


def to_hugging_face(params: Params, config: ModelConfig) -> LlamaForCausalLM:
    """A LlamaForCausalLM with the text parameters; torch keeps a linear layer's weight transposed."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.text_vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    )
    state = {
        "model.embed_tokens.weight": params.text_embedding,
        "model.norm.weight": params.final_norm,
        "lm_head.weight": params.text_head.T,
    }
    names = {
        "input_layernorm": "attention_norm",
        "self_attn.q_proj": "wq",
        "self_attn.k_proj": "wk",
        "self_attn.v_proj": "wv",
        "self_attn.o_proj": "wo",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "w1",
        "mlp.up_proj": "w3",
        "mlp.down_proj": "w2",
    }
    for i in range(config.num_layers):
        for theirs, ours in names.items():
            state[f"model.layers.{i}.{theirs}.weight"] = getattr(params.layers, ours)[i].T
    missing = model.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in state.items()}, strict=True)
    assert not missing.missing_keys
    return model.eval()


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
def test_logits_equal_those_of_hugging_face_llama(kv_heads: int) -> None:
    config = ModelConfig(64, 96, 3, 4, kv_heads, text_vocab_size=100, rope_theta=5e4)
    params = init_params(config, jax.random.key(0))
    params = dataclasses.replace(params, final_norm=1 + 0.1 * jax.random.normal(jax.random.key(1), (64,)))
    tokens = np.random.default_rng(0).integers(0, 100, (2, 37)).astype(np.int32)
    ones = np.ones_like(tokens)
    positions = np.broadcast_to(np.arange(37, dtype=np.int32), tokens.shape)
    hidden = forward(params, config, tokens, np.zeros(tokens.shape, bool), ones, positions)
    with torch.no_grad():
        theirs = to_hugging_face(params, config)(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(
        np.asarray(hidden @ params.text_head), theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max()
    )


def test_the_7b_preset_has_the_parameters_of_the_release() -> None:
    from lwm_train.config import ModelSpec

    config = ModelSpec(preset="7b").config(32000)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert num_params(shapes) == 6_807_621_632  # of the release's vision model


MESHES = [MeshSpec(fsdp=8), MeshSpec(tp=2, sp=4), MeshSpec(dp=2, fsdp=2, sp=2)]


@pytest.mark.parametrize(
    "spec",
    [OptimizerSpec(lr=1e-2, schedule="constant"), OptimizerSpec(name="muon", lr=1e-2, adam_lr=1e-2)],
    ids=lambda spec: spec.name,
)
def test_a_step_is_the_same_on_every_mesh(spec: OptimizerSpec) -> None:
    config = ModelConfig(32, 64, 2, 4, 2, text_vocab_size=64)
    rows = packed_rows(random_examples(np.random.default_rng(0), 24, 24, 64), 64, 8, "example")
    optimizer = make_optimizer(spec, 10)

    def two_steps(mesh_spec: MeshSpec) -> tuple[list[float], Params]:
        mesh = make_mesh(mesh_spec)
        state = init_state(config, optimizer, mesh, seed=0)
        step = make_train_step(config, optimizer, LossSpec(), mesh)
        losses = []
        for _ in range(2):
            state, report = step(state, put_on_mesh(make_batch(rows), mesh))
            losses.append(float(report.loss))
        return losses, jax.tree.map(np.asarray, state.params)

    losses, params = two_steps(MeshSpec())
    for mesh_spec in MESHES if spec.name == "adamw" else MESHES[2:]:
        other_losses, other_params = two_steps(mesh_spec)
        np.testing.assert_allclose(other_losses, losses, rtol=2e-6, err_msg=str(mesh_spec))
        for a, b in zip(jax.tree.leaves(other_params), jax.tree.leaves(params), strict=True):
            # AdamW's first steps are sign-like: where a gradient is rounding noise, so is the update.
            assert np.mean(np.abs(a - b) > 1e-4) < 2e-3, mesh_spec


def test_angles_of_late_positions_are_those_of_float64() -> None:
    from lwm_train.model import rope_rotation

    config = ModelConfig(64, 64, 1, 1, 1, 10, rope_theta=5e7, dtype="bfloat16")
    position = np.array([[2**20 - 1]], np.int32)
    cos, _ = rope_rotation(position, config, jnp.bfloat16)
    angle = (2**20 - 1) * 5e7 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(np.asarray(cos)[0, 0, 0], np.cos(angle), atol=0.1)
