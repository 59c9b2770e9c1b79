"""LLaMA with one embedding table and one head for each modality (the release's `lwm/vision_llama.py`).

    tokens_BL, vision_mask_BL --> text or vision embedding
      L times:  x += attention(norm(x));  x += swiglu(norm(x))          layers are scanned: leaves are [layers, ...]
    norm --> hidden_BLD --> text head [D, V], vision head [D, 8448]     heads are applied in loss.py and generate.py

Remat and the MLP's chunks say how much of a layer exists at a time and change no result (remat.py, mlp.py).

Shape suffixes: B rows, L tokens of a row, D dim, H heads, K key/value heads, E head dim, F ffn dim, V vocabulary.
Positions are given, never assumed, so packed rows and any order of the tokens need no special case here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lwm_train.attention import attention
from lwm_train.config import ModelConfig
from lwm_train.mesh import constrain, spec_of
from lwm_train.mlp import linear, swiglu
from lwm_train.remat import remat


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layer:
    """Parameters of the decoder layers, stacked: the first axis is the layer."""

    attention_norm: jax.Array  # [layer, D]
    wq: jax.Array  # [layer, D, H * E]
    wk: jax.Array  # [layer, D, K * E]
    wv: jax.Array  # [layer, D, K * E]
    wo: jax.Array  # [layer, H * E, D]
    ffn_norm: jax.Array  # [layer, D]
    w1: jax.Array  # [layer, D, F]: gate
    w3: jax.Array  # [layer, D, F]: up
    w2: jax.Array  # [layer, F, D]: down


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Params:
    """All parameters of the model. The heads are None where they are tied: `heads` gives them."""

    text_embedding: jax.Array  # [V, D]
    vision_embedding: jax.Array  # [8448, D]
    layers: Layer
    final_norm: jax.Array  # [D]
    text_head: jax.Array | None  # [D, V]
    vision_head: jax.Array | None  # [D, 8448]


_AnyLayer: Any = Layer  # the same trees with something else than arrays as leaves
_AnyParams: Any = Params

LOGICAL_AXES: Params = _AnyParams(
    text_embedding=("vocab", "dim"),
    vision_embedding=("vocab", "dim"),
    layers=_AnyLayer(
        attention_norm=("layer", None),
        wq=("layer", "dim", "heads"),
        wk=("layer", "dim", "heads"),
        wv=("layer", "dim", "heads"),
        wo=("layer", "heads", "dim"),
        ffn_norm=("layer", None),
        w1=("layer", "dim", "ffn"),
        w3=("layer", "dim", "ffn"),
        w2=("layer", "ffn", "dim"),
    ),
    final_norm=(None,),
    text_head=("dim", "vocab"),
    vision_head=("dim", "vocab"),
)
"""The logical axes of every parameter, in the tree of the parameters (mesh.py maps them to devices)."""


def param_shapes(config: ModelConfig) -> Params:
    """The shape of every parameter."""
    d, f, n = config.dim, config.ffn_dim, config.num_layers
    h, k = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: Params = _AnyParams(
        text_embedding=(config.text_vocab_size, d),
        vision_embedding=(config.vision_vocab_size, d),
        layers=_AnyLayer(
            attention_norm=(n, d),
            wq=(n, d, h),
            wk=(n, d, k),
            wv=(n, d, k),
            wo=(n, h, d),
            ffn_norm=(n, d),
            w1=(n, d, f),
            w3=(n, d, f),
            w2=(n, f, d),
        ),
        final_norm=(d,),
        text_head=None if config.tie_heads else (d, config.text_vocab_size),
        vision_head=None if config.tie_heads else (d, config.vision_vocab_size),
    )
    return shapes


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters: norms 1, all else normal of deviation 1 / sqrt(dim).

    The release takes 0.02 at every size, which is about 1 / sqrt(dim) at 7B (0.016) and far too small at a demo's.
    """
    dtype = jnp.float64 if config.dtype == "float64" else jnp.float32
    shapes = param_shapes(config)
    keys = iter(jax.random.split(key, len(jax.tree.leaves(shapes, is_leaf=_is_shape))))

    def make(path: tuple[Any, ...], shape: tuple[int, ...]) -> jax.Array:
        key = next(keys)
        if "norm" in path[-1].name:
            return jnp.ones(shape, dtype)
        return config.dim**-0.5 * jax.random.normal(key, shape, dtype)

    params: Params = jax.tree.map_with_path(make, shapes, is_leaf=_is_shape)
    return params


def heads(params: Params) -> tuple[jax.Array, jax.Array]:
    """The text head [D, V] and the vision head [D, 8448]."""
    if params.text_head is None or params.vision_head is None:
        return params.text_embedding.T, params.vision_embedding.T
    return params.text_head, params.vision_head


def _is_shape(x: object) -> bool:
    return isinstance(x, tuple)


def forward(
    params: Params,
    config: ModelConfig,
    tokens_BL: jax.Array,
    vision_mask_BL: jax.Array,
    segment_ids_BL: jax.Array,
    position_ids_BL: jax.Array,
    mesh: Mesh | None = None,
) -> jax.Array:
    """hidden_BLD, normalised, ready for a head."""
    dtype = jnp.dtype(config.dtype)
    x_BLD = embed(params, tokens_BL, vision_mask_BL, mesh).astype(dtype)
    x_BLD = constrain(x_BLD, mesh, "batch", "length", None)
    rotation = rope_rotation(position_ids_BL, config, dtype)

    def block(x_BLD: jax.Array, layer: Layer) -> tuple[jax.Array, None]:
        layer = jax.tree.map(lambda w: w.astype(dtype), layer)
        q, k, v = project_qkv(layer, config, x_BLD, rotation)
        how = {"schedule": config.attention_schedule, "kernel": config.attention_kernel}
        out_BLHE = attention(q, k, v, segment_ids_BL, position_ids_BL, mesh=mesh, **how)
        x_BLD = finish_block(layer, config, x_BLD, out_BLHE, config.mlp_chunk, mesh)
        return constrain(x_BLD, mesh, "batch", "length", None), None

    x_BLD, _ = jax.lax.scan(remat(config.remat, block, mesh), x_BLD, params.layers)
    return rms_norm(x_BLD, params.final_norm, config.norm_eps)


def embed(params: Params, tokens_BL: jax.Array, vision_mask_BL: jax.Array, mesh: Mesh | None = None) -> jax.Array:
    """Each token's row of its modality's table.

    On a mesh each device looks up its own tokens in its own part of the vocabulary. Left to itself the compiler
    gathers both tables whole on every device, and then all tokens' rows too.
    """
    tables = params.text_embedding, params.vision_embedding
    if mesh is None or mesh.size == 1:
        text = tables[0][jnp.where(vision_mask_BL, 0, tokens_BL)]
        vision = tables[1][jnp.where(vision_mask_BL, tokens_BL, 0)]
        return jnp.where(vision_mask_BL[..., None], vision, text)

    def on_each_device(tables: tuple[jax.Array, jax.Array], tokens: jax.Array, vision_mask: jax.Array) -> jax.Array:
        text, vision = (_own_rows(table, tokens) for table in tables)
        return jax.lax.psum(jnp.where(vision_mask[..., None], vision, text), "tp")

    vocabulary, tokens = spec_of("vocab", None), spec_of("batch", "length")
    sharded = jax.shard_map(
        on_each_device,
        mesh=mesh,
        in_specs=((vocabulary, vocabulary), tokens, tokens),
        out_specs=spec_of("batch", "length", None),
        check_vma=False,
    )
    return sharded(tables, tokens_BL, vision_mask_BL)


def _own_rows(table_VD: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    """Rows of this device's part of the vocabulary; zeros for tokens of another part."""
    at_BL = tokens_BL - jax.lax.axis_index("tp") * len(table_VD)
    own_BL = (at_BL >= 0) & (at_BL < len(table_VD))
    return jnp.where(own_BL[..., None], table_VD[jnp.where(own_BL, at_BL, 0)], 0)


def rope_rotation(position_ids_BL: jax.Array, config: ModelConfig, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every position's angles, [B, L, 1, E / 2]; angles in float32 at least (bf16 ruins them)."""
    wide = jnp.promote_types(jnp.float32, dtype)
    frequency = config.rope_theta ** (-jnp.arange(0, config.head_dim, 2, dtype=wide) / config.head_dim)
    angle = position_ids_BL[..., None, None].astype(wide) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BLHE: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary position embedding; channel i is paired with channel i + E / 2 (the Hugging Face layout)."""
    cos, sin = rotation
    a, b = jnp.split(x_BLHE.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BLHE.dtype)


def project_qkv(
    layer: Layer, config: ModelConfig, x_BLD: jax.Array, rotation: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q_BLHE, k_BLKE (both rotated) and v_BLKE of one layer."""
    h_BLD = rms_norm(x_BLD, layer.attention_norm, config.norm_eps)
    q, k, v = (linear(h_BLD, w).reshape(*h_BLD.shape[:2], -1, config.head_dim) for w in (layer.wq, layer.wk, layer.wv))
    return rotate(q, rotation), rotate(k, rotation), v


def finish_block(
    layer: Layer,
    config: ModelConfig,
    x_BLD: jax.Array,
    out_BLHE: jax.Array,
    mlp_chunk: int | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """The residual stream after attention's output projection and the MLP of one layer."""
    x_BLD = x_BLD + linear(out_BLHE.reshape(*x_BLD.shape[:2], -1), layer.wo)
    h_BLD = rms_norm(x_BLD, layer.ffn_norm, config.norm_eps)
    return x_BLD + swiglu(h_BLD, layer.w1, layer.w3, layer.w2, mlp_chunk, mesh)


def rms_norm(x_BLD: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """x over its root mean square, times `weight`; the mean in float32 at least."""
    wide = x_BLD.astype(jnp.promote_types(jnp.float32, x_BLD.dtype))
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x_BLD.dtype) * weight_D.astype(x_BLD.dtype)


def num_params(params: Params) -> int:
    """Parameters of the model."""
    return sum(x.size for x in jax.tree.leaves(params))
