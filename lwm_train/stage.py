"""A stage made ready: a train manifest with its data opened, its mesh, its step, and the state it begins with.

TrainManifest -> datasets, tokenizer -> model config -> mesh -> optimizer, loader, compiled step
                                                         '--> first_state: random, or another run's parameters
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from lwm_data.format.dataset import Dataset, open_dataset
from lwm_data.format.vocab import TextTokenizer
from lwm_train.batch import Batch
from lwm_train.checkpoint import restore_params
from lwm_train.config import InitFromRun, ModelConfig, TrainManifest
from lwm_train.identity import run_content
from lwm_train.loader import Loader
from lwm_train.mesh import make_mesh
from lwm_train.optimizer import make_optimizer
from lwm_train.run_file import read_run_file
from lwm_train.step import StepReport, TrainState, init_state, make_train_step, state_layout


@dataclass(frozen=True)
class Stage:
    """content: what run.json holds of it."""

    manifest: TrainManifest
    datasets: Sequence[Dataset]
    tokenizer: TextTokenizer
    config: ModelConfig
    content: dict[str, Any]

    @property
    def run(self) -> Path:
        """Folder of the run."""
        return Path(self.manifest.out)

    @property
    def row_length(self) -> int:
        return self.datasets[0].info.row_length

    @cached_property
    def mesh(self) -> Mesh:
        """The mesh of the manifest; ValueError where devices, rows or their length do not fit it."""
        mesh = make_mesh(self.manifest.mesh)
        _check_fits(self.manifest, self.row_length, mesh)
        return mesh

    @cached_property
    def optimizer(self) -> Any:
        return make_optimizer(self.manifest.optimizer, self.manifest.steps)

    @cached_property
    def train_step(self) -> Callable[[TrainState, Batch], tuple[TrainState, StepReport]]:
        m = self.manifest
        return make_train_step(self.config, self.optimizer, m.loss, self.mesh, m.accumulate)

    def loader(self) -> Loader:
        """Batches of the stage's data."""
        m = self.manifest
        return Loader(self.datasets, [spec.share for spec in m.data], m.seed, m.batch_rows, self.mesh, m.order)

    def layout(self) -> TrainState:
        """Shape, dtype and place of every array of the state."""
        return state_layout(self.config, self.optimizer, self.mesh)

    def first_state(self) -> TrainState:
        """The state before the first step. ValueError where it is another run's that does not fit."""
        state = init_state(self.config, self.optimizer, self.mesh, self.manifest.seed)
        if isinstance(self.manifest.init, InitFromRun):
            params = _params_of(self.manifest.init, self.config, self.content, self.mesh)
            state = TrainState(state.step, params, state.opt_state)
        return state


def open_stage(manifest: TrainManifest) -> Stage:
    """The stage of the manifest. ValueError where its datasets are not there or do not go together."""
    datasets = [open_dataset(spec.dataset) for spec in manifest.data]
    tokenizer = _shared_tokenizer(manifest, datasets)
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[manifest.precision]
    config = manifest.model.config(tokenizer.vocab_size, dtype, manifest.remat, manifest.mlp_chunk, manifest.attention)
    return Stage(manifest, datasets, tokenizer, config, run_content(manifest, datasets, config))


def _shared_tokenizer(manifest: TrainManifest, datasets: Sequence[Dataset]) -> TextTokenizer:
    """The tokenizer of all the datasets; ValueError where two differ."""
    first = datasets[0]
    for spec, dataset in zip(manifest.data, datasets, strict=True):
        if dataset.info.tokenizer_fingerprint != first.info.tokenizer_fingerprint:
            raise ValueError(
                f"data: {spec.dataset}: built with tokenizer {dataset.info.tokenizer_fingerprint[:12]}, "
                f"{first.url} with {first.info.tokenizer_fingerprint[:12]}; a model has one: build both with the same"
            )
        if dataset.info.row_length != first.info.row_length:
            raise ValueError(
                f"data: {spec.dataset}: rows of {dataset.info.row_length:,} tokens, {first.url} of "
                f"{first.info.row_length:,}; a batch has one length: build both with the same row_length"
            )
    return first.text_tokenizer


def _check_fits(manifest: TrainManifest, length: int, mesh: Mesh) -> None:
    rows_over = mesh.shape["dp"] * mesh.shape["fsdp"]
    if manifest.batch_rows % (rows_over * manifest.accumulate):
        parts = f" x accumulate {manifest.accumulate}" if manifest.accumulate > 1 else ""
        raise ValueError(f"batch_rows: got {manifest.batch_rows}; wanted a multiple of dp x fsdp = {rows_over}{parts}")
    chunks = mesh.shape["sp"] * (2 if manifest.order == "zigzag" else 1)
    if length % chunks:
        raise ValueError(f"mesh: sp: got {mesh.shape['sp']}; rows of {length:,} tokens are cut into {chunks} chunks")


def _params_of(init: InitFromRun, config: ModelConfig, content: dict[str, Any], mesh: Mesh) -> Any:
    """Parameters of the finished run `init.run`; ValueError where its model or tokenizer is another."""
    before = read_run_file(init.run)
    if before["tokenizer_fingerprint"] != content["tokenizer_fingerprint"]:
        raise ValueError(
            f"init: {init.run}: its model was trained with tokenizer {before['tokenizer_fingerprint'][:12]}, the data "
            f"are built with {content['tokenizer_fingerprint'][:12]}; build them with the model's tokenizer"
        )
    not_the_model = ("rope_theta", "dtype", "remat", "mlp_chunk", "attention_schedule", "attention_kernel")
    sizes = {key: value for key, value in asdict(config).items() if key not in not_the_model}
    changes = [
        f"{key}: was {before['model'].get(key)}, is {value}"
        for key, value in sizes.items()
        if before["model"].get(key) != value
    ]
    if changes:
        raise ValueError(f"init: {init.run}: another model: {'; '.join(changes)}")
    params, step = restore_params(init.run, mesh)
    if step != before["manifest"]["steps"]:
        raise ValueError(f"init: {init.run}: stopped at step {step} of {before['manifest']['steps']}; finish it first")
    return params
