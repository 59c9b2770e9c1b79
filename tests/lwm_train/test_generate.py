"""Decoding with a cache against the model's own full forward pass, run again for every token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwm_train.config import MeshSpec, ModelConfig, ModelSpec
from lwm_train.generate import bucket, decode_step, generate, prefill
from lwm_train.mesh import make_mesh
from lwm_train.model import Params, forward, init_params

CONFIG = ModelSpec(preset="tiny").config(text_vocab_size=97)
LENGTHS = (1, 5, 31, 32, 33, 70)


@pytest.fixture(scope="module")
def params() -> Params:
    return init_params(CONFIG, jax.random.key(7))


def prompts_of(lengths: tuple[int, ...], vocab_size: int = CONFIG.text_vocab_size) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


def last_logits(params: Params, config: ModelConfig, ids: list[int]) -> np.ndarray:
    """Logits after `ids`, one unpadded row through `forward`."""
    tokens = jnp.array([ids], jnp.int32)
    positions = jnp.arange(len(ids), dtype=jnp.int32)[None]
    hidden = forward(params, config, tokens, jnp.zeros_like(tokens, bool), jnp.ones_like(tokens), positions)
    return np.asarray(hidden[0, -1] @ params.text_head)


def greedy(params: Params, prompt: list[int], num_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(np.argmax(last_logits(params, CONFIG, ids))))
    return ids[len(prompt) :]


def test_cached_hidden_states_are_those_of_the_full_forward() -> None:
    with jax.enable_x64(True):
        config = ModelSpec(preset="tiny").config(97, dtype="float64")
        params = init_params(config, jax.random.key(1))
        rows = prompts_of((3, 9, 14))
        first = np.array([16 - len(row) for row in rows], np.int32)
        tokens = np.zeros((3, 16), np.int32)
        for i, row in enumerate(rows):
            tokens[i, first[i] :] = row
        tokens[tokens == 0] = 5  # what lies in the padding must not matter
        hidden, cache = prefill(params, config, jnp.array(tokens), jnp.array(first), 20, None)
        assert cache.keys.shape == cache.values.shape == (2, 3, 20, 2, 8)
        for step in range(4):
            wanted = [last_logits(params, config, row) for row in rows]
            np.testing.assert_allclose(hidden @ params.text_head, wanted, rtol=1e-9, atol=1e-9)
            rows = [[*row, step + i] for i, row in enumerate(rows)]
            new = jnp.array([row[-1] for row in rows], jnp.int32)
            hidden, cache = decode_step(params, config, cache, new, jnp.zeros(3, bool))


def test_greedy_tokens_are_those_of_the_full_forward(params: Params) -> None:
    prompts = prompts_of((1, 5, 33))
    got = generate(params, CONFIG, prompts, 7, temperature=0, seed=0, eos=None)
    assert got == [greedy(params, prompt, 7) for prompt in prompts]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_its_batch(params: Params, temperature: float) -> None:
    prompts = prompts_of(LENGTHS)
    together = generate(params, CONFIG, prompts, 9, temperature=temperature, seed=4, eos=None)
    # The rows before it stay in number (sampling is keyed by the row) but change in length, and so does the batch.
    for row in (0, 3, 5):
        others = [[1, 2]] * row
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
    draws = generate(params, CONFIG, [[3, 1, 4]] * 2048, 1, temperature=2.0, seed=5, eos=None)
    share = np.bincount([ids[0] for ids in draws], minlength=CONFIG.text_vocab_size) / len(draws)
    logits = last_logits(params, CONFIG, [3, 1, 4]) / 2.0
    wanted = np.exp(logits - logits.max())
    wanted /= wanted.sum()
    assert np.abs(share - wanted).sum() < 0.25  # about 0.14 is expected of 2,048 draws over 97 ids


def test_a_row_ends_before_its_eos(params: Params) -> None:
    prompts = prompts_of((4, 12))
    free = generate(params, CONFIG, prompts, 12, temperature=1.0, seed=2, eos=None)
    assert [len(ids) for ids in free] == [12, 12]
    eos = free[0][5]
    ended = generate(params, CONFIG, prompts, 12, temperature=1.0, seed=2, eos=eos)
    assert ended == [ids[: ids.index(eos)] if eos in ids else ids for ids in free]


def test_a_mesh_changes_nothing(params: Params) -> None:
    prompts = prompts_of((5, 33, 61))
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
