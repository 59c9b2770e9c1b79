"""One prefill and decode loop. Text so far: the sampled head is the text head; the cache knows no modality.

    prompts, right-aligned                        decode steps, one slot each
    slot     0  1  2  3  4  5  6  7               8  9  10 ...
    row 0    .  .  .  ^  a  b  c  d               A  B  $                .  padding: never seen, by anyone
    row 1    ^  e  f  g  h  i  j  k               C  D  E  F             $  eos: the row is done
    first    3
             0                                    all rows write to the same slot at the same time

Every slot before a row's first is padding; a token's position is its slot minus the row's first. Prompts are put in
batches of about one length, and lengths in buckets, so that few shapes are compiled. A row's tokens depend on
neither its batch nor its padding: sampling is keyed by (seed, row, position). Whoever watches sees the tokens of a
row every WATCH_EVERY steps, and may end it.

Shape suffixes as in model.py; P slots of prompts, S slots of the cache, G = H / K query heads of each key head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lwm_train.attention import attention
from lwm_train.config import ModelConfig
from lwm_train.mesh import constrain, sharding
from lwm_train.model import Layer, Params, embed, finish_block, heads, project_qkv, rms_norm, rope_rotation

BATCH_SLOTS = 16_384  # slots of prompts in one batch
BATCH_ROWS = 32
SMALLEST_BUCKET = 32
WATCH_EVERY = 16  # decode steps

Watch = Callable[[int, list[int], bool], bool]
"""(prompt's number, its tokens so far, whether these are all) -> whether to go on with it."""


@dataclass(frozen=True)
class Draw:
    """How the tokens after one prompt are drawn: at most `num_tokens`; at position p a function of (seed, row, p).

    temperature: 0 takes the likeliest token, else tokens are drawn from softmax(logits / temperature).
    seed: in uint32.
    """

    num_tokens: int
    temperature: float
    seed: int
    row: int = 0


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

    seed: the draw at position p of prompt r is a function of (seed, r, p); `temperature` and the rest as in
    `generate_drawn`.
    """
    draws = [Draw(num_tokens, temperature, seed, row) for row in range(len(prompts))]
    return generate_drawn(params, config, prompts, draws, eos=eos, mesh=mesh, progress=progress)


def generate_drawn(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    draws: Sequence[Draw],
    *,
    eos: int | None,
    mesh: Mesh | None = None,
    progress: Callable[[int], None] | None = None,
    watch: Watch | None = None,
) -> list[list[int]]:
    """The tokens after each prompt by its own draw, up to its `eos`, which is left out.

    mesh: None is the first device, where the parameters are brought if they lie elsewhere.
    progress: called after each batch with the number of its prompts.
    watch: called every WATCH_EVERY tokens for each prompt that is not finished, and once when it is.

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
    answers: list[list[int]] = [[] for _ in prompts]
    if max((draw.num_tokens for draw in draws), default=0) < 1:
        return answers
    if mesh is None:
        params = jax.device_put(params, jax.devices()[0])
    for rows, batch_rows, num_slots in _batches([len(prompt) for prompt in prompts], mesh):
        tokens = np.zeros((batch_rows, num_slots), np.int32)
        first = np.full(batch_rows, num_slots, np.int32)  # of a row that only fills up the batch: no token at all
        for i, row in enumerate(rows):
            first[i] = num_slots - len(prompts[row])
            tokens[i, first[i] :] = prompts[row]
        drawn = {row: draws[row] for row in rows}
        answers_of_batch = _generate_batch(
            params, config, tokens, first, drawn, -1 if eos is None else eos, mesh, watch
        )  # fmt: skip
        for row, ids in zip(rows, answers_of_batch, strict=True):
            answers[row] = ids
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


def _generate_batch(
    params: Params, config: ModelConfig, tokens: np.ndarray, first: np.ndarray, drawn: Mapping[int, Draw], eos: int,
    mesh: Mesh | None, watch: Watch | None,
) -> list[list[int]]:  # fmt: skip
    """The tokens of each prompt of `drawn` (its number and draw); rows beyond them only fill up the batch."""
    batch_rows, numbers, draws = len(tokens), list(drawn), list(drawn.values())
    filled = [*draws, *[replace(draws[0], num_tokens=0)] * (batch_rows - len(draws))]
    drawing = _Drawing(
        _put(np.array([draw.num_tokens for draw in filled], np.int32), mesh),
        _put(np.array([draw.temperature for draw in filled], np.float32), mesh),
        _put(np.array([draw.seed for draw in filled], np.uint32), mesh),
        _put(np.array([draw.row for draw in filled], np.int32), mesh),
        np.int32(eos),
    )
    num_tokens = max(draw.num_tokens for draw in draws)
    state = _begin(params, config, _put(tokens, mesh), _put(first, mesh), drawing, bucket(num_tokens), mesh)
    ended = np.zeros(batch_rows, bool)
    told = [False] * len(draws)
    for until in [*(range(WATCH_EVERY, num_tokens, WATCH_EVERY) if watch else ()), num_tokens]:
        state = _go_on(params, config, state, drawing, _put(ended, mesh), np.int32(until))
        found = [
            _up_to(ids[: min(until, draw.num_tokens)], eos)
            for ids, draw in zip(np.asarray(state.out_BN).tolist(), draws, strict=False)
        ]
        if watch is None:
            break
        done = np.asarray(state.done_B)
        for i, number in enumerate(numbers):
            if not told[i]:
                told[i] = not watch(number, found[i], bool(done[i])) or bool(done[i])
                ended[i] = told[i]
        if all(told):
            break
    return found


def _up_to(ids: list[int], eos: int) -> list[int]:
    return ids[: ids.index(eos)] if eos in ids else ids


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Drawing:
    """The draws of a batch's rows, as arrays; eos: int32[], -1 for none."""

    num_tokens_B: jax.Array
    temperature_B: jax.Array
    seed_B: jax.Array
    row_B: jax.Array
    eos: jax.Array | np.int32

    def sample(self, params: Params, hidden_BD: jax.Array, position_B: jax.Array) -> jax.Array:
        """int32[B]: the token at `position_B`, after hidden_BD."""
        wide = jnp.promote_types(jnp.float32, hidden_BD.dtype)
        logits_BV = jnp.dot(hidden_BD, heads(params)[0].astype(hidden_BD.dtype), preferred_element_type=wide)
        likeliest_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

        def draw() -> jax.Array:
            fold_in = jax.vmap(jax.random.fold_in)
            keys_B = fold_in(fold_in(jax.vmap(jax.random.key)(self.seed_B), self.row_B), position_B)
            temperature_B = jnp.where(self.temperature_B > 0, self.temperature_B, 1)
            drawn_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV / temperature_B[:, None]).astype(jnp.int32)
            return jnp.where(self.temperature_B > 0, drawn_B, likeliest_B)

        return jax.lax.cond(jnp.any(self.temperature_B > 0), draw, lambda: likeliest_B)

    def is_last(self, tokens_B: jax.Array, num_done: jax.Array | int) -> jax.Array:
        """bool[B]: no token follows tokens_B, the `num_done`-th of each row."""
        return (tokens_B == self.eos) | (num_done >= self.num_tokens_B)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """out_BN: int32, a row's tokens up to its eos or `num_tokens`, the rest means nothing. tokens_B: the last ones."""

    out_BN: jax.Array
    done_B: jax.Array
    tokens_B: jax.Array
    cache: KVCache


@partial(jax.jit, static_argnames=("config", "num_new", "mesh"))
def _begin(
    params: Params, config: ModelConfig, tokens_BP: jax.Array, first_B: jax.Array, drawing: _Drawing, num_new: int,
    mesh: Mesh | None,
) -> _State:  # fmt: skip
    """The state after each row's first token, with room for `num_new` tokens."""
    num_rows, num_slots = tokens_BP.shape
    hidden_BD, cache = prefill(params, config, tokens_BP, first_B, num_slots + num_new, mesh)
    tokens_B = drawing.sample(params, hidden_BD, num_slots - first_B)
    out_BN = jnp.zeros((num_rows, num_new), jnp.int32).at[:, 0].set(tokens_B)
    return _State(out_BN, drawing.is_last(tokens_B, 1), tokens_B, cache)


@partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def _go_on(
    params: Params, config: ModelConfig, state: _State, drawing: _Drawing, ended_B: jax.Array, until: jax.Array
) -> _State:
    """The state when each row has `until` tokens, is done, or is among `ended_B`."""
    num_slots = state.cache.keys.shape[3] - state.out_BN.shape[1]

    def unfinished(state: _State) -> jax.Array:
        return (state.cache.num_filled - num_slots + 1 < until) & ~jnp.all(state.done_B)

    def step(state: _State) -> _State:
        text_B = jnp.zeros(state.tokens_B.shape, bool)
        hidden_BD, cache = decode_step(params, config, state.cache, state.tokens_B, text_B)
        tokens_B = drawing.sample(params, hidden_BD, cache.num_filled - cache.first_B)
        num_done = cache.num_filled - num_slots + 1
        out_BN = jax.lax.dynamic_update_slice(state.out_BN, tokens_B[:, None], (jnp.int32(0), num_done - 1))
        return _State(out_BN, state.done_B | drawing.is_last(tokens_B, num_done), tokens_B, cache)

    return jax.lax.while_loop(unfinished, step, replace(state, done_B=state.done_B | ended_B))


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
