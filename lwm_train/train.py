"""Train the stages of a manifest, top to bottom: open the data, make or restore the state, step, save.

A run goes on where it was: the newest whole checkpoint says which step is next, and the loader needs nothing else.
SIGTERM saves and ends well; the first Ctrl-C saves and ends, the second ends at once.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from lwm_data.format.dataset import Dataset, open_dataset
from lwm_data.terminal import Progress
from lwm_train.checkpoint import Checkpoints, read_run_file, restore_params, write_run_file
from lwm_train.config import InitFromRun, ModelConfig, TrainManifest
from lwm_train.identity import check_unchanged, run_content
from lwm_train.loader import Loader
from lwm_train.mesh import make_mesh, request_devices
from lwm_train.metrics import MetricsLog, drop_metrics_after
from lwm_train.model import num_params
from lwm_train.optimizer import make_optimizer
from lwm_train.step import TrainState, init_state, make_train_step, state_layout


@dataclass(frozen=True)
class StageResult:
    """How a stage ended. stopped: by a signal, before its last step."""

    run: Path
    step: int
    stopped: str | None
    loss: float | None
    seconds: float


def train_stages(stages: Sequence[TrainManifest], allow: Sequence[str] = ()) -> list[StageResult]:
    """Train each stage in turn; a finished stage is passed over. Ends early when a signal asks."""
    request_devices([stage.mesh for stage in stages])
    results = []
    with _signals() as asked:
        for stage in stages:
            results.append(_train_stage(stage, allow, asked))
            if results[-1].stopped:
                break
    return results


def _train_stage(manifest: TrainManifest, allow: Sequence[str], asked: list[str]) -> StageResult:
    run = Path(manifest.out)
    datasets = [open_dataset(spec.dataset) for spec in manifest.data]
    tokenizer = _shared_tokenizer(manifest, datasets)
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[manifest.precision]
    config = manifest.model.config(tokenizer.vocab_size, dtype, manifest.remat, manifest.mlp_chunk)
    content = run_content(manifest, datasets, config)
    check_unchanged(run, content, allow)
    mesh = make_mesh(manifest.mesh)
    _check_fits(manifest, datasets, mesh)
    optimizer = make_optimizer(manifest.optimizer, manifest.steps)
    run.mkdir(parents=True, exist_ok=True)

    begin = time.monotonic()
    with Checkpoints(run, manifest.checkpoint) as checkpoints:
        done = checkpoints.latest_step()
        if done == manifest.steps:
            return StageResult(run, done, None, None, 0.0)
        if done is not None and done > manifest.steps:
            raise ValueError(f"steps: got {manifest.steps}; {run} has done {done} already; wanted {done} or more")
        if done is not None:
            state = checkpoints.restore(done, state_layout(config, optimizer, mesh))
        else:
            state = init_state(config, optimizer, mesh, manifest.seed)
            if isinstance(manifest.init, InitFromRun):
                state = TrainState(state.step, _initial_params(manifest.init, config, content, mesh), state.opt_state)
        done = done or 0
        write_run_file(run, content | {"mesh": dict(mesh.shape), "device": mesh.devices.flat[0].device_kind})
        tokenizer.save(run)
        drop_metrics_after(run, done)
        print(_headline(manifest, datasets, config, state, mesh, done), file=sys.stderr, flush=True)
        loader = Loader(
            datasets, [spec.share for spec in manifest.data], manifest.seed, manifest.batch_rows, mesh, manifest.order
        )
        train_step = make_train_step(config, optimizer, manifest.loss, mesh, manifest.accumulate)
        log = MetricsLog(manifest, run, datasets[0].info.row_length)
        with log, Progress(f"train {manifest.name}", manifest.steps - done, "steps") as progress:
            for step, batch in enumerate(loader.batches(done, manifest.steps), start=done + 1):
                state, report = train_step(state, batch)
                progress.advance(1, log.write(step, report, loader.seconds_waited))
                if step % manifest.checkpoint.every == 0 or step == manifest.steps or asked:
                    checkpoints.save(step, state)
                if asked:
                    break
    return StageResult(run, step, asked[0] if asked else None, log.loss, time.monotonic() - begin)


def _shared_tokenizer(manifest: TrainManifest, datasets: Sequence[Dataset]) -> Any:
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


def _check_fits(manifest: TrainManifest, datasets: Sequence[Dataset], mesh: Mesh) -> None:
    rows_over = mesh.shape["dp"] * mesh.shape["fsdp"]
    if manifest.batch_rows % (rows_over * manifest.accumulate):
        parts = f" x accumulate {manifest.accumulate}" if manifest.accumulate > 1 else ""
        raise ValueError(f"batch_rows: got {manifest.batch_rows}; wanted a multiple of dp x fsdp = {rows_over}{parts}")
    length, chunks = datasets[0].info.row_length, mesh.shape["sp"] * (2 if manifest.order == "zigzag" else 1)
    if length % chunks:
        raise ValueError(f"mesh: sp: got {mesh.shape['sp']}; rows of {length:,} tokens are cut into {chunks} chunks")


def _initial_params(init: InitFromRun, config: ModelConfig, content: dict[str, Any], mesh: Mesh) -> Any:
    """Parameters of the finished run `init.run`; ValueError where its model or tokenizer is another."""
    before = read_run_file(init.run)
    if before["tokenizer_fingerprint"] != content["tokenizer_fingerprint"]:
        raise ValueError(
            f"init: {init.run}: its model was trained with tokenizer {before['tokenizer_fingerprint'][:12]}, the data "
            f"are built with {content['tokenizer_fingerprint'][:12]}; build them with the model's tokenizer"
        )
    sizes = {
        key: value for key, value in asdict(config).items() if key not in ("rope_theta", "dtype", "remat", "mlp_chunk")
    }
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


def _headline(
    manifest: TrainManifest, datasets: Sequence[Dataset], config: ModelConfig, state: TrainState, mesh: Mesh, done: int
) -> str:
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    device = mesh.devices.flat[0]
    return (
        f"{manifest.name}: {num_params(state.params):,} parameters, rope theta {config.rope_theta:g}; "
        f"{mesh.size} {device.platform} device{'s' if mesh.size > 1 else ''} ({axes}); "
        f"{manifest.batch_rows} rows of {datasets[0].info.row_length:,} tokens a step; "
        f"{'from step ' + str(done) if done else manifest.steps} of {manifest.steps} steps"
    )


@contextmanager
def _signals() -> Iterator[list[str]]:
    """Within the block, SIGTERM and the first Ctrl-C only leave their name in the list."""
    asked: list[str] = []

    def note(number: int, frame: object) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
