"""Decoding with a cache against the model's own full forward pass, run again for every token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwm_train.config import MeshSpec, ModelConfig, ModelSpec
from lwm_train.generate import Draw, bucket, decode_step, generate, generate_drawn, prefill
from lwm_train.mesh import make_mesh
from lwm_train.model import Params, forward, init_params

CONFIG = ModelSpec(preset="tiny").config(text_vocab_size=97)
LENGTHS = (1, 5, 31, 40)  # two buckets, 32 and 40; shapes recur in the tests, so that little is compiled


@pytest.fixture(scope="module")
def params() -> Params:
    return jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(7))


def prompts_of(lengths: tuple[int, ...], vocab_size: int = CONFIG.text_vocab_size) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


def all_logits(params: Params, config: ModelConfig, rows: list[list[int]]) -> list[np.ndarray]:
    """float[len(row), V] of each row: one full forward pass, rows left-aligned."""
    tokens = np.zeros((len(rows), 64), np.int32)
    segments = np.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        segments[i, : len(row)] = 1
    positions = np.broadcast_to(np.arange(64, dtype=np.int32), tokens.shape)
    hidden = jax.jit(forward, static_argnums=1)(
        params, config, tokens, np.zeros_like(tokens, bool), segments, positions
    )
    logits = np.asarray(hidden @ params.text_head)
    return [logits[i, : len(row)] for i, row in enumerate(rows)]


def test_cached_hidden_states_are_those_of_the_full_forward() -> None:
    with jax.enable_x64(True):
        config = ModelSpec(preset="tiny").config(97, dtype="float64")
        params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(1))
        lengths, num_slots = (3, 9, 14), 16
        rows = prompts_of(tuple(length + 4 for length in lengths))
        wanted = all_logits(params, config, rows)
        tokens = np.full((3, num_slots), 5, np.int32)  # what lies in the padding must not matter
        first = np.array([num_slots - length for length in lengths], np.int32)
        for i, length in enumerate(lengths):
            tokens[i, first[i] :] = rows[i][:length]
        hidden, cache = jax.jit(prefill, static_argnums=(1, 4, 5))(params, config, tokens, first, 20, None)
        step_fn = jax.jit(decode_step, static_argnums=1)
        assert cache.keys.shape == cache.values.shape == (2, 3, 2, 20, 8)
        for step in range(5):
            at = [logits[length + step - 1] for logits, length in zip(wanted, lengths, strict=True)]
            np.testing.assert_allclose(hidden @ params.text_head, at, rtol=1e-9, atol=1e-9)
            if step < 4:
                new = jnp.array([row[length + step] for row, length in zip(rows, lengths, strict=True)], jnp.int32)
                hidden, cache = step_fn(params, config, cache, new, jnp.zeros(3, bool))


def test_greedy_tokens_are_those_of_the_full_forward(params: Params) -> None:
    prompts = prompts_of(LENGTHS)
    got = generate(params, CONFIG, prompts, 7, temperature=0, seed=0, eos=None)
    wholes = [prompt + ids for prompt, ids in zip(prompts, got, strict=True)]
    for logits, ids in zip(all_logits(params, CONFIG, wholes), got, strict=True):
        assert ids == np.argmax(logits, axis=1)[-8:-1].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_its_batch(params: Params, temperature: float) -> None:
    prompts = prompts_of(LENGTHS)
    together = generate(params, CONFIG, prompts, 9, temperature=temperature, seed=4, eos=None)
    # The rows before it stay in number (sampling is keyed by the row) but change in length, and so does the batch.
    for row in (0, 3):
        others = [[1, 2, 3]] * row
        alone = generate(params, CONFIG, [*others, prompts[row]], 9, temperature=temperature, seed=4, eos=None)
        assert alone[row] == together[row]


def test_samples_depend_on_seed_and_row_and_follow_the_temperature(params: Params) -> None:
    prompts = [[3, 1, 4, 1, 5]] * 64

    def first_tokens(temperature: float, seed: int) -> list[int]:
        return [ids[0] for ids in generate(params, CONFIG, prompts, 1, temperature=temperature, seed=seed, eos=None)]

    assert first_tokens(1.0, 0) == first_tokens(1.0, 0) != first_tokens(1.0, 1)
    assert len(set(first_tokens(1.0, 0))) > 5
    assert set(first_tokens(1e-4, 0)) == set(first_tokens(0, 0))


def test_sampling_follows_the_softmax(params: Params) -> None:
    draws = generate(params, CONFIG, [[3, 1, 4]] * 1024, 1, temperature=2.0, seed=5, eos=None)
    share = np.bincount([ids[0] for ids in draws], minlength=CONFIG.text_vocab_size) / len(draws)
    logits = all_logits(params, CONFIG, [[3, 1, 4]])[0][-1] / 2.0
    wanted = np.exp(logits - logits.max())
    wanted /= wanted.sum()
    assert np.abs(share - wanted).sum() < 0.35  # about 0.2 is expected of 1,024 draws over 97 ids


def test_a_row_ends_before_its_eos(params: Params) -> None:
    prompts = prompts_of((4, 12, 20))
    free = generate(params, CONFIG, prompts, 12, temperature=1.0, seed=2, eos=None)
    assert [len(ids) for ids in free] == [12, 12, 12]
    eos = free[0][5]
    ended = generate(params, CONFIG, prompts, 12, temperature=1.0, seed=2, eos=eos)
    assert ended == [ids[: ids.index(eos)] if eos in ids else ids for ids in free]


def test_a_mesh_changes_nothing(params: Params) -> None:
    prompts = prompts_of((5, 20, 31))
    mesh = make_mesh(MeshSpec(dp=2, tp=2, sp=2))
    got = generate(params, CONFIG, prompts, 6, temperature=0, seed=0, eos=None, mesh=mesh)
    assert got == generate(params, CONFIG, prompts, 6, temperature=0, seed=0, eos=None)


def test_every_prompt_is_counted_once(params: Params) -> None:
    done: list[int] = []
    prompts = prompts_of(LENGTHS)
    generate(params, CONFIG, prompts, 1, temperature=0, seed=0, eos=None, progress=done.append)
    assert sum(done) == len(prompts)
    assert generate(params, CONFIG, prompts, 0, temperature=0, seed=0, eos=None) == [[]] * len(prompts)
    assert generate(params, CONFIG, [], 5, temperature=0, seed=0, eos=None) == []


def test_buckets_hold_their_length_with_little_waste() -> None:
    sizes = [bucket(length) for length in range(1, 5000)]
    assert all(length <= size <= max(32, 1.25 * length) for length, size in enumerate(sizes, start=1))
    assert len(set(sizes)) < 32


@pytest.mark.parametrize("prompt", [[], [97], [-1, 3]])
def test_a_prompt_that_the_model_cannot_read_is_refused(params: Params, prompt: list[int]) -> None:
    with pytest.raises(ValueError, match="prompt 1: "):
        generate(params, CONFIG, [[1], prompt], 1, temperature=0, seed=0, eos=None)


def test_prompts_of_one_batch_keep_their_own_draws(params: Params) -> None:
    prompts = prompts_of(LENGTHS)
    draws = [Draw(9, 0, 0), Draw(5, 1.0, 7, row=2), Draw(9, 0.5, 2**32 - 1), Draw(0, 1.0, 1)]
    together = generate_drawn(params, CONFIG, prompts, draws, eos=None)
    assert [len(ids) for ids in together] == [9, 5, 9, 0]
    for prompt, draw, ids in zip(prompts[:3], draws, together, strict=False):
        rows = [[1]] * draw.row + [prompt]  # generate numbers its prompts
        wanted = generate(params, CONFIG, rows, draw.num_tokens, temperature=draw.temperature, seed=draw.seed, eos=None)
        assert ids == wanted[draw.row]


def test_who_watches_sees_every_prompt_grow_and_may_end_it(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lwm_train.generate.WATCH_EVERY", 3)
    prompts = prompts_of(LENGTHS)
    draws = [Draw(n, 0, 0) for n in (8, 9, 4, 9)]
    whole = generate_drawn(params, CONFIG, prompts, draws, eos=None)
    seen: dict[int, list[tuple[list[int], bool]]] = {i: [] for i in range(4)}

    def watch(number: int, ids: list[int], finished: bool) -> bool:
        seen[number].append((ids, finished))
        return number != 3 or len(ids) < 6

    assert generate_drawn(params, CONFIG, prompts, draws, eos=None, watch=watch)[:3] == whole[:3]
    for number, lengths in enumerate([(3, 6, 8), (3, 6, 9), (3, 4), (3, 6)]):
        assert seen[number] == [(whole[number][:n], n == draws[number].num_tokens) for n in lengths]
