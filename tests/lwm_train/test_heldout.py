"""The held-out loss against one forward pass per example, each alone in a row without padding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from lwm_data.format.dataset import Dataset
from lwm_data.format.example import text_runs, vision_runs
from lwm_data.format.vocab import TextTokenizer
from lwm_data.sources.record import Record
from lwm_train.config import MeshSpec, ModelConfig, ModelSpec
from lwm_train.evaluate.heldout import heldout_loss
from lwm_train.mesh import make_mesh
from lwm_train.model import Params, forward, init_params

MakeDataset = Callable[..., Dataset]


@pytest.fixture(scope="module")
def records(demo_tokenizer: TextTokenizer, corpus_text: str) -> list[Record]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(7):
        prompt = demo_tokenizer.encode(corpus_text[900 * i : 900 * i + 100])
        answer = demo_tokenizer.encode(corpus_text[900 * i + 100 : 900 * i + 300 + 90 * i])
        runs = text_runs(demo_tokenizer, [(prompt, False), (answer, True)], eos=True)
        if i == 3:
            codes = rng.integers(0, 8192, (1, 256), dtype=np.int32)
            runs = (*runs[:2], *vision_runs(demo_tokenizer, codes, trained=True), *runs[2:])
        made.append(Record(f"{i}", runs))
    return made


@pytest.fixture(scope="module")
def config(demo_tokenizer: TextTokenizer) -> ModelConfig:
    return ModelSpec(preset="tiny").config(demo_tokenizer.vocab_size)


@pytest.fixture(scope="module")
def params(config: ModelConfig) -> Params:
    return jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))


def losses_by_hand(params: Params, config: ModelConfig, records: list[Record]) -> list[tuple[float, float, int]]:
    """(mean nats, accuracy, tokens) of text and of vision: every example alone, log-softmax of whole logits."""
    nats: tuple[list[float], list[float]] = ([], [])
    right: tuple[list[bool], list[bool]] = ([], [])
    length = 512
    jitted = jax.jit(forward, static_argnums=1)
    for record in records:
        tokens = np.concatenate([run.tokens for run in record.runs])
        vision = np.concatenate([np.full(len(run.tokens), run.is_vision) for run in record.runs])
        trained = np.concatenate([np.full(len(run.tokens), run.trained) for run in record.runs])
        pad = (0, length - len(tokens))
        segment = np.pad(np.ones(len(tokens), np.int32), pad)
        hidden = jitted(
            params, config, np.pad(tokens, pad)[None], np.pad(vision, pad)[None], segment[None],
            np.arange(length, dtype=np.int32)[None],
        )  # fmt: skip
        hidden = np.asarray(hidden[0], np.float64)
        for at in np.flatnonzero(trained):
            head = np.asarray(params.vision_head if vision[at] else params.text_head, np.float64)
            logits = hidden[at - 1] @ head
            nats[int(vision[at])].append(
                np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[tokens[at]]
            )
            right[int(vision[at])].append(bool(np.argmax(logits) == tokens[at]))
    return [(float(np.mean(n)), float(np.mean(r)), len(n)) for n, r in zip(nats, right, strict=True)]


def test_loss_is_the_mean_over_trained_tokens_of_examples_alone(
    tmp_path: Path, dataset_of: MakeDataset, records: list[Record], config: ModelConfig, params: Params
) -> None:
    (text, text_accuracy, num_text), (vision, vision_accuracy, num_vision) = losses_by_hand(params, config, records)
    for weighting, mesh_spec, batch_rows in [("example", MeshSpec(), 3), ("token", MeshSpec(dp=2, sp=2), 6)]:
        dataset = dataset_of(tmp_path / weighting, records, 512, weighting=weighting)
        assert len(dataset) % batch_rows, "the last batch must be filled up"
        mesh = make_mesh(mesh_spec, jax.devices()[: mesh_spec.dp * mesh_spec.sp])
        rows: list[int] = []
        got = heldout_loss(params, config, dataset, mesh, batch_rows, rows.append)
        assert sum(rows) == len(dataset)
        assert (got.num_text, got.num_vision) == (num_text, num_vision)
        assert got.text_loss == pytest.approx(text, rel=1e-4)
        assert got.vision_loss == pytest.approx(vision, rel=1e-4)
        assert got.text_accuracy == pytest.approx(text_accuracy, abs=1e-3)
        assert got.vision_accuracy == pytest.approx(vision_accuracy, abs=1e-3)
        assert got.text_perplexity == pytest.approx(np.exp(text), rel=1e-3)


def test_a_dataset_that_does_not_fit_the_model_or_the_mesh_is_refused(
    tmp_path: Path, dataset_of: MakeDataset, records: list[Record], config: ModelConfig, params: Params
) -> None:
    dataset = dataset_of(tmp_path, records, 512)
    one = make_mesh(MeshSpec(), jax.devices()[:1])
    with pytest.raises(ValueError, match="built with the tokenizer of the training data"):
        heldout_loss(params, ModelSpec(preset="tiny").config(99), dataset, one, 2)
    with pytest.raises(ValueError, match="do not divide"):
        heldout_loss(params, config, dataset, make_mesh(MeshSpec(dp=2), jax.devices()[:2]), 3)
