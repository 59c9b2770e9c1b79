"""One prefill and decode loop. Text so far: the sampled head is the text head; the cache knows no modality.

    prompts, right-aligned                        decode steps, one slot each
    slot     0  1  2  3  4  5  6  7               8  9  10 ...
    row 0    .  .  .  ^  a  b  c  d               A  B  $                .  padding: never seen, by anyone
    row 1    ^  e  f  g  h  i  j  k               C  D  E  F             $  eos: the row is done
    first    3
             0                                    all rows write to the same slot at the same time

Every slot before a row's first is padding; a token's position is its slot minus the row's first. Prompts are put in
batches of about one length, and lengths in buckets, so that few shapes are compiled. A row's tokens depend on
neither its batch nor its padding: sampling is keyed by (seed, row, position).

Shape suffixes as in model.py; P slots of prompts, S slots of the cache, G = H / K query heads of each key head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lwm_train.attention import attention
from lwm_train.config import ModelConfig
from lwm_train.mesh import constrain, sharding
from lwm_train.model import Layer, Params, embed, finish_block, project_qkv, rms_norm, rope_rotation

BATCH_SLOTS = 16_384  # slots of prompts in one batch
BATCH_ROWS = 32
SMALLEST_BUCKET = 32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """What decoding has to know of the tokens so far.

    keys: [layers, B, K, S, E] in the activations' dtype, already rotated; slots from `num_filled` on are 0. Heads
        stand before slots, so that a step reads each head's slots in a row (5 times as fast on a CPU).
    values: [layers, B, K, S, E].
    first_B: int32[B], the slot of the row's first token; slots before it are padding.
    num_filled: int32[], slots in use: where the next token of every row goes.
    """

    keys: jax.Array
    values: jax.Array
    first_B: jax.Array
    num_filled: jax.Array


def generate(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    temperature: float,
    seed: int,
    eos: int | None,
    mesh: Mesh | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """At most `num_tokens` text tokens after each prompt, up to its `eos`, which is left out.

    temperature: 0 takes the likeliest token, else tokens are drawn from softmax(logits / temperature).
    seed: the draw at position p of prompt r is a function of (seed, r, p).
    mesh: None is the first device, where the parameters are brought if they lie elsewhere.
    progress: called after each batch with the number of its prompts.

    Raises:
        ValueError: for an empty prompt, or an id that is not in the text vocabulary.
    """
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row}: empty; it needs at least BOS")
        if min(prompt) < 0 or max(prompt) >= config.text_vocab_size:
            raise ValueError(
                f"prompt {row}: ids from {min(prompt)} to {max(prompt)}; the model has text ids 0 to "
                f"{config.text_vocab_size - 1}"
            )
    if num_tokens < 1:
        return [[] for _ in prompts]
    if mesh is None:
        params = jax.device_put(params, jax.devices()[0])
    answers: list[list[int]] = [[] for _ in prompts]
    for rows, batch_rows, num_slots in _batches([len(prompt) for prompt in prompts], mesh):
        tokens = np.zeros((batch_rows, num_slots), np.int32)
        first = np.full(batch_rows, num_slots, np.int32)  # of a row that only fills up the batch: no token at all
        for i, row in enumerate(rows):
            first[i] = num_slots - len(prompts[row])
            tokens[i, first[i] :] = prompts[row]
        numbers = np.resize(np.array(rows, np.int32), batch_rows)
        out = _generate_batch(
            params, config, _put(tokens, mesh), _put(first, mesh), _put(numbers, mesh), np.int32(num_tokens),
            np.float32(temperature), np.uint32(seed), np.int32(-1 if eos is None else eos), bucket(num_tokens), mesh,
        )  # fmt: skip
        for row, ids in zip(rows, np.asarray(out).tolist(), strict=False):
            ids = ids[:num_tokens]
            answers[row] = ids[: ids.index(eos)] if eos in ids else ids
        if progress is not None:
            progress(len(rows))
    return answers


def prefill(
    params: Params, config: ModelConfig, tokens_BP: jax.Array, first_B: jax.Array, num_slots: int, mesh: Mesh | None
) -> tuple[jax.Array, KVCache]:
    """hidden_BD of the prompts' last tokens, and their cache of `num_slots` slots.

    tokens_BP: int32, right-aligned: row b's prompt is tokens_BP[b, first_B[b]:].
    """
    dtype = jnp.dtype(config.dtype)
    slots_P = jnp.arange(tokens_BP.shape[1], dtype=jnp.int32)
    segment_ids_BP = (slots_P >= first_B[:, None]).astype(jnp.int32)
    position_ids_BP = jnp.maximum(slots_P - first_B[:, None], 0)
    rotation = rope_rotation(position_ids_BP, config, dtype)
    x_BPD = embed(params, tokens_BP, jnp.zeros(tokens_BP.shape, bool)).astype(dtype)

    def block(x_BPD: jax.Array, layer: Layer) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        layer = jax.tree.map(lambda w: w.astype(dtype), layer)
        q, k, v = project_qkv(layer, config, x_BPD, rotation)
        out_BPHE = attention(q, k, v, segment_ids_BP, position_ids_BP, mesh=mesh)
        x_BPD = finish_block(layer, config, x_BPD, out_BPHE)
        return constrain(x_BPD, mesh, "batch", "length", None), (k, v)

    x_BPD, kv = jax.lax.scan(block, constrain(x_BPD, mesh, "batch", "length", None), params.layers)
    room = [(0, 0), (0, 0), (0, 0), (0, num_slots - tokens_BP.shape[1]), (0, 0)]
    keys, values = (jnp.pad(x.transpose(0, 1, 3, 2, 4), room) for x in kv)
    hidden_BD = rms_norm(x_BPD[:, -1:], params.final_norm, config.norm_eps)[:, 0]
    return hidden_BD, KVCache(keys, values, first_B, jnp.int32(tokens_BP.shape[1]))


def decode_step(
    params: Params, config: ModelConfig, cache: KVCache, tokens_B: jax.Array, vision_mask_B: jax.Array
) -> tuple[jax.Array, KVCache]:
    """hidden_BD after one more token of every row, and the cache with it. The cache must have a free slot."""
    dtype = jnp.dtype(config.dtype)
    slot = cache.num_filled
    zero = jnp.int32(0)
    slots_S = jnp.arange(cache.keys.shape[3], dtype=jnp.int32)
    seen_BS = (slots_S >= cache.first_B[:, None]) & (slots_S <= slot)
    rotation = rope_rotation((slot - cache.first_B)[:, None], config, dtype)
    x_B1D = embed(params, tokens_B[:, None], vision_mask_B[:, None]).astype(dtype)

    def block(
        carry: tuple[jax.Array, jax.Array, jax.Array], layer_and_number: tuple[Layer, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        x_B1D, keys, values = carry
        layer, number = layer_and_number
        layer = jax.tree.map(lambda w: w.astype(dtype), layer)
        q, k, v = project_qkv(layer, config, x_B1D, rotation)
        at = (number, zero, zero, slot, zero)
        keys = jax.lax.dynamic_update_slice(keys, k.transpose(0, 2, 1, 3)[None], at)
        values = jax.lax.dynamic_update_slice(values, v.transpose(0, 2, 1, 3)[None], at)
        out_B1HE = _attend_cache(q, keys[number], values[number], seen_BS)
        return (finish_block(layer, config, x_B1D, out_B1HE), keys, values), None

    numbers = jnp.arange(config.num_layers, dtype=jnp.int32)
    (x_B1D, keys, values), _ = jax.lax.scan(block, (x_B1D, cache.keys, cache.values), (params.layers, numbers))
    hidden_BD = rms_norm(x_B1D, params.final_norm, config.norm_eps)[:, 0]
    return hidden_BD, replace(cache, keys=keys, values=values, num_filled=slot + 1)


def bucket(length: int) -> int:
    """The least of 32, 40, 48, 56, 64, 80, 96, ... (four to an octave) that is not below `length`."""
    step = max(SMALLEST_BUCKET, 1 << max(0, length - 1).bit_length()) // 8
    return max(SMALLEST_BUCKET, _up(length, step))


def _attend_cache(q_B1HE: jax.Array, k_BKSE: jax.Array, v_BKSE: jax.Array, seen_BS: jax.Array) -> jax.Array:
    """Dense attention of one query to all slots that its row has filled; sums in float32 at least."""
    rows, key_heads, _, head_dim = k_BKSE.shape
    wide = jnp.promote_types(jnp.float32, q_B1HE.dtype)
    q_BKGE = q_B1HE.reshape(rows, key_heads, -1, head_dim)
    scores_BKGS = jnp.einsum("bkge,bkse->bkgs", q_BKGE, k_BKSE, preferred_element_type=wide) / math.sqrt(head_dim)
    p_BKGS = jax.nn.softmax(jnp.where(seen_BS[:, None, None], scores_BKGS, -jnp.inf), axis=-1).astype(v_BKSE.dtype)
    out_BKGE = jnp.einsum("bkgs,bkse->bkge", p_BKGS, v_BKSE, preferred_element_type=wide)
    return out_BKGE.astype(q_B1HE.dtype).reshape(q_B1HE.shape)


@partial(jax.jit, static_argnames=("config", "num_new", "mesh"))
def _generate_batch(
    params: Params, config: ModelConfig, tokens_BP: jax.Array, first_B: jax.Array, rows_B: jax.Array,
    num_tokens: jax.Array, temperature: jax.Array, seed: jax.Array, eos: jax.Array, num_new: int, mesh: Mesh | None,
) -> jax.Array:  # fmt: skip
    """int32[B, num_new]: the first `num_tokens` of each row are its tokens, up to its eos; the rest means nothing."""
    num_rows, num_slots = tokens_BP.shape
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows_B)

    def sample(hidden_BD: jax.Array, slot: jax.Array) -> jax.Array:
        wide = jnp.promote_types(jnp.float32, hidden_BD.dtype)
        logits_BV = jnp.dot(hidden_BD, params.text_head.astype(hidden_BD.dtype), preferred_element_type=wide)

        def draw() -> jax.Array:
            draw_keys_B = jax.vmap(jax.random.fold_in)(keys_B, slot - first_B)
            return jax.vmap(jax.random.categorical)(draw_keys_B, logits_BV / temperature).astype(jnp.int32)

        return jax.lax.cond(temperature > 0, draw, lambda: jnp.argmax(logits_BV, axis=-1).astype(jnp.int32))

    def unfinished(state: tuple[jax.Array, jax.Array, jax.Array, KVCache]) -> jax.Array:
        _, done_B, _, cache = state
        return (cache.num_filled - num_slots + 1 < num_tokens) & ~jnp.all(done_B)

    def step(
        state: tuple[jax.Array, jax.Array, jax.Array, KVCache],
    ) -> tuple[jax.Array, jax.Array, jax.Array, KVCache]:
        out_BN, done_B, tokens_B, cache = state
        hidden_BD, cache = decode_step(params, config, cache, tokens_B, jnp.zeros(num_rows, bool))
        tokens_B = sample(hidden_BD, cache.num_filled)
        out_BN = jax.lax.dynamic_update_slice(out_BN, tokens_B[:, None], (jnp.int32(0), cache.num_filled - num_slots))
        return out_BN, done_B | (tokens_B == eos), tokens_B, cache

    hidden_BD, cache = prefill(params, config, tokens_BP, first_B, num_slots + num_new, mesh)
    tokens_B = sample(hidden_BD, cache.num_filled)
    out_BN = jnp.zeros((num_rows, num_new), jnp.int32).at[:, 0].set(tokens_B)
    done_B = (tokens_B == eos) | (first_B == num_slots)
    return jax.lax.while_loop(unfinished, step, (out_BN, done_B, tokens_B, cache))[0]


def _batches(lengths: list[int], mesh: Mesh | None) -> list[tuple[list[int], int, int]]:
    """(rows, rows of the batch, slots) of every batch; those of one bucket have equal shapes."""
    ring = 1 if mesh is None else mesh.shape["sp"]
    replicas = 1 if mesh is None else mesh.shape["dp"] * mesh.shape["fsdp"]
    by_slots: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        by_slots.setdefault(_up(bucket(length), ring), []).append(row)
    batches = []
    for num_slots, rows in sorted(by_slots.items()):
        num_batches = -(-len(rows) // max(1, min(BATCH_ROWS, BATCH_SLOTS // num_slots)))
        batch_rows = -(-len(rows) // num_batches)
        if num_batches == 1 and batch_rows > 2:
            batch_rows = _up(batch_rows, 4)  # so that another call with a few prompts more needs no new shape
        batch_rows = _up(batch_rows, replicas)
        batches += [(rows[i : i + batch_rows], batch_rows, num_slots) for i in range(0, len(rows), batch_rows)]
    return batches


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _put(array: np.ndarray, mesh: Mesh | None) -> jax.Array:
    return jax.device_put(array, None if mesh is None else sharding(mesh, *("batch", "length")[: array.ndim]))
