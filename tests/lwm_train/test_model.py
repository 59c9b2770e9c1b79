"""The model against Hugging Face's LLaMA and PyTorch's gradients; its sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lwm_train.batch import Batch
from lwm_train.config import PRESETS, ModelConfig, ModelSpec
from lwm_train.loss import loss_and_sums
from lwm_train.model import Params, forward, heads, init_params, num_params


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
    state = {name: torch.tensor(np.asarray(value)) for name, value in hugging_face_names(params, config).items()}
    missing = model.load_state_dict(state, strict=True)
    assert not missing.missing_keys
    return model.eval()


def hugging_face_names(params: Params, config: ModelConfig) -> dict[str, Any]:
    """The text parameters (or their gradients) by the names and in the shapes of Hugging Face's LLaMA."""
    state: dict[str, Any] = {
        "model.embed_tokens.weight": params.text_embedding,
        "model.norm.weight": params.final_norm,
        "lm_head.weight": heads(params)[0].T,
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
    return state


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


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
def test_gradients_equal_those_of_pytorch(kv_heads: int) -> None:
    config = ModelConfig(64, 96, 3, 4, kv_heads, text_vocab_size=100, rope_theta=5e4)
    params = init_params(config, jax.random.key(2))
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 100, (2, 29)).astype(np.int32)
    pull = rng.normal(size=(2, 29, 100)).astype(np.float32)
    positions = np.broadcast_to(np.arange(29, dtype=np.int32), tokens.shape)

    def pulled(params: Params) -> jax.Array:
        hidden = forward(params, config, tokens, np.zeros(tokens.shape, bool), np.ones_like(tokens), positions)
        return (hidden @ heads(params)[0] * pull).sum()

    ours = jax.tree.map(np.asarray, jax.jit(jax.grad(pulled))(params))
    model = to_hugging_face(params, config)
    (model(torch.tensor(tokens, dtype=torch.long)).logits * torch.tensor(pull)).sum().backward()
    theirs = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    for name, gradient in hugging_face_names(ours, config).items():
        wanted = theirs.pop(name)
        np.testing.assert_allclose(gradient, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max(), err_msg=name)
    assert not theirs


@pytest.mark.parametrize(
    ("preset", "vocabulary", "published"),
    [
        ("7b", 32_000, 6_738_415_616),  # LLaMA-2 7B
        ("13b", 32_000, 13_015_864_320),  # LLaMA-2 13B
        ("70b", 32_000, 68_976_648_192),  # LLaMA-2 70B
        ("3b", 32_000, 3_426_473_600),  # OpenLLaMA 3B
        ("8b", 128_256, 8_030_261_248),  # LLaMA-3 8B
        ("8b", 32_000, 7_241_732_096),  # Mistral 7B
        ("1b-gqa", 32_000, 1_100_048_384),  # TinyLlama 1.1B
    ],
)
def test_presets_have_the_published_number_of_parameters(preset: str, vocabulary: int, published: int) -> None:
    spec = ModelSpec.model_validate({"preset": preset})
    params = jax.eval_shape(lambda: init_params(spec.config(vocabulary), jax.random.key(0)))
    vision = params.vision_embedding.size + params.vision_head.size
    assert vision == 2 * 8448 * PRESETS[spec.preset][0]
    assert num_params(params) - vision == published


def test_the_7b_preset_has_the_parameters_of_the_releases_vision_model() -> None:
    shapes = jax.eval_shape(lambda: init_params(ModelSpec(preset="7b").config(32_000), jax.random.key(0)))
    assert num_params(shapes) == 6_807_621_632
    tied = jax.eval_shape(lambda: init_params(ModelSpec(preset="7b", tie_heads=True).config(32_000), jax.random.key(0)))
    assert num_params(shapes) - num_params(tied) == (32_000 + 8448) * 4096


def test_a_tied_table_gets_the_gradients_of_both_its_uses() -> None:
    config = ModelConfig(16, 24, 2, 2, 2, text_vocab_size=12, vision_vocab_size=14, tie_heads=True)
    tied = init_params(config, jax.random.key(3))
    assert tied.text_head is None and tied.vision_head is None
    tables = {"text_head": tied.text_embedding.T, "vision_head": tied.vision_embedding.T}
    untied = dataclasses.replace(tied, **tables)
    rng = np.random.default_rng(3)
    tokens, mask = rng.integers(0, 12, (2, 9)).astype(np.int32), rng.random((2, 9)) < 0.5
    positions = np.broadcast_to(np.arange(9, dtype=np.int32), tokens.shape)
    ones = np.ones_like(tokens)
    batch: Any = Batch(tokens, mask, ones, positions, tokens, ~mask, ones.astype(np.float32))

    def loss(params: Params) -> jax.Array:
        hidden = forward(params, config, tokens, mask, ones, positions)
        return loss_and_sums(hidden, *heads(params), batch)[0]

    (value, both), (wanted, apart) = (jax.jit(jax.value_and_grad(loss))(params) for params in (tied, untied))
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    np.testing.assert_allclose(both.text_embedding, apart.text_embedding + apart.text_head.T, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        both.vision_embedding, apart.vision_embedding + apart.vision_head.T, rtol=1e-4, atol=1e-6
    )


def test_angles_of_late_positions_are_those_of_float64() -> None:
    from lwm_train.model import rope_rotation

    config = ModelConfig(64, 64, 1, 1, 1, 10, rope_theta=5e7, dtype="bfloat16")
    position = np.array([[2**20 - 1]], np.int32)
    cos, _ = rope_rotation(position, config, jnp.bfloat16)
    angle = (2**20 - 1) * 5e7 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(np.asarray(cos)[0, 0, 0], np.cos(angle), atol=0.1)
