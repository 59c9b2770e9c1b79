"""Model FLOPs of a step of packed rows, and what the devices could do at most: MFU is their quotient over time.

    3 x (forward):   2 x tokens x weights of the layers        live tokens: padding is work, but not the model's
                     4 x pairs x heads x head dim x layers     pairs of a token and one before it in its own segment
                     2 x targets x dim x vocabulary            of each head, for the tokens that are trained by it

What `remat` computes twice counts once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lwm_train.batch import Batch
from lwm_train.config import ModelConfig

# Dense bf16 FLOP/s of one device, by the beginning of JAX's name for it, from the vendors' sheets.
PEAK_BF16 = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


@jax.jit
def live_work(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(live tokens, live pairs) of a batch on the mesh: a token sees those of its segment up to itself."""
    live = batch.segment_ids > 0
    pairs = jnp.where(live, batch.position_ids + 1, 0).astype(jnp.float32)
    return jnp.sum(live), jnp.sum(jnp.sum(pairs, axis=1))


def step_flops(config: ModelConfig, tokens: float, pairs: float, text_targets: float, vision_targets: float) -> float:
    """Model FLOPs of a training step on so much live work."""
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weights = config.num_layers * config.dim * (2 * heads + 2 * kv_heads + 3 * config.ffn_dim)
    attention = 4 * pairs * heads * config.num_layers
    targets = text_targets * config.text_vocab_size + vision_targets * config.vision_vocab_size
    return 3.0 * (2 * tokens * weights + attention + 2 * targets * config.dim)


def peak_flops(device_kind: str, precision: str) -> float | None:
    """FLOP/s of one device at most; None where nobody has told: on CPU, and in fp32, whose peak depends on settings."""
    if precision != "bf16":
        return None
    return next((peak for name, peak in PEAK_BF16.items() if device_kind.startswith(name)), None)
