"""Train the stages of a manifest, top to bottom: open the data, make or restore the state, step, save.

A run goes on where it was: the newest whole checkpoint says which step is next, and the loader needs nothing else.
SIGTERM saves and ends well; the first Ctrl-C saves and ends, the second ends at once.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lwm_data.format.dataset import Dataset, open_dataset
from lwm_data.terminal import Progress, RunFailed
from lwm_train.checkpoint import Checkpoints, read_run_file, restore_params, write_run_file
from lwm_train.config import InitFromRun, ModelConfig, TrainManifest
from lwm_train.loader import Loader
from lwm_train.mesh import make_mesh, request_devices
from lwm_train.model import num_params
from lwm_train.optimizer import make_optimizer, make_schedule
from lwm_train.step import StepReport, TrainState, init_state, make_train_step

METRICS = "metrics.jsonl"
# What a resumed run may not change: with another value it would be another run.
FIXED = ("seed", "init", "model", "precision", "data", "batch_rows", "steps", "optimizer", "loss")


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
    config = manifest.model.config(tokenizer.vocab_size, dtype, manifest.remat)
    content = _run_content(manifest, datasets, config)
    _check_unchanged(run, content, allow)
    mesh = make_mesh(manifest.mesh)
    _check_fits(manifest, datasets, mesh)
    optimizer = make_optimizer(manifest.optimizer, manifest.steps)
    run.mkdir(parents=True, exist_ok=True)
    write_run_file(run, content | {"mesh": dict(mesh.shape), "device": mesh.devices.flat[0].device_kind})
    tokenizer.save(run)

    begin = time.monotonic()
    with Checkpoints(run, manifest.checkpoint) as checkpoints:
        done = checkpoints.latest_step()
        if done == manifest.steps:
            return StageResult(run, done, None, None, 0.0)
        state = init_state(config, optimizer, mesh, manifest.seed)
        if done is not None:
            state = checkpoints.restore(done, state)
        elif isinstance(manifest.init, InitFromRun):
            state = TrainState(state.step, _initial_params(manifest.init, config, content, mesh), state.opt_state)
        done = done or 0
        _drop_metrics_after(run, done)
        print(_headline(manifest, datasets, config, state, mesh, done), flush=True)
        loader = Loader(
            datasets, [spec.share for spec in manifest.data], manifest.seed, manifest.batch_rows, mesh, manifest.order
        )
        train_step = make_train_step(config, optimizer, manifest.loss.shares, mesh)
        log = _Log(manifest, run, datasets[0].info.row_length)
        with log, Progress(f"train {manifest.name}", manifest.steps - done, "steps") as progress:
            for step, batch in enumerate(loader.batches(done, manifest.steps), start=done + 1):
                state, report = train_step(state, batch)
                progress.advance(1, log.write(step, report, loader.seconds_waited))
                if step % manifest.checkpoint.every == 0 or step == manifest.steps or asked:
                    checkpoints.save(step, state)
                if asked:
                    break
    return StageResult(run, step, asked[0] if asked else None, log.loss, time.monotonic() - begin)


class _Log:
    """metrics.jsonl, a line a step, and the note beside the progress bar."""

    def __init__(self, manifest: TrainManifest, run: Path, row_length: int) -> None:
        self._manifest, self._path = manifest, run / METRICS
        self._batch_tokens = manifest.batch_rows * row_length
        self._schedule = make_schedule(manifest.optimizer, manifest.steps)
        self.loss: float | None = None
        self._tokens = 0

    def __enter__(self) -> _Log:
        self._file = open(self._path, "a", encoding="utf-8")
        self._begin = self._last = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, step: int, report: StepReport, seconds_waited: float) -> str:
        """Log one step; ValueError when its loss is not finite. Returns the note."""
        loss = float(report.loss)
        sums = report.sums
        now = time.monotonic()
        tokens = self._batch_tokens
        by_modality = [
            float(ce) / float(weights) if weights > 0 else None
            for ce, weights in zip(sums.weighted_ce, sums.weights, strict=True)
        ]
        line = {
            "stage": self._manifest.name,
            "step": step,
            "loss": loss,
            "text_loss": by_modality[0],
            "vision_loss": by_modality[1],
            "lr": float(self._schedule(step - 1)),
            "grad_norm": float(report.grad_norm),
            "tokens": step * tokens,
            "trained_tokens": int(sums.num_trained.sum()),
            "tokens_per_s": tokens / (now - self._last),
            "seconds_waited": round(seconds_waited, 4),
            "time": round(now - self._begin, 3),
        }
        self._last = now
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if not math.isfinite(loss):
            raise RunFailed(f"{self._manifest.name}: step {step}: loss {loss}; the newest checkpoint is from before it")
        self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss
        self._tokens += tokens
        return f"loss {self.loss:.3f}, {self._tokens / (now - self._begin):,.0f} tokens/s"


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
    if manifest.batch_rows % rows_over:
        raise ValueError(f"batch_rows: got {manifest.batch_rows}; wanted a multiple of dp x fsdp = {rows_over}")
    length = datasets[0].info.row_length
    if length % (2 * mesh.shape["sp"]):
        raise ValueError(f"mesh: sp: got {mesh.shape['sp']}; rows of {length:,} tokens are cut into 2 x sp chunks")


def _run_content(manifest: TrainManifest, datasets: Sequence[Dataset], config: ModelConfig) -> dict[str, Any]:
    """What run.json holds."""
    return {
        "name": manifest.name,
        "manifest": json.loads(manifest.model_dump_json()),
        "model": asdict(config),
        "tokenizer_fingerprint": datasets[0].info.tokenizer_fingerprint,
        "datasets": [{"path": d.url, "name": d.info.name, "fingerprint": d.info.fingerprint} for d in datasets],
        "versions": {"jax": jax.__version__},
    }


def _check_unchanged(run: Path, content: dict[str, Any], allow: Sequence[str]) -> None:
    """ValueError with every difference where the folder holds another run's checkpoints."""
    for key in allow:
        if key not in (*FIXED, "datasets"):
            raise ValueError(f"--allow {key}: wanted one of {', '.join((*FIXED, 'datasets'))}")
    if not (run / "checkpoints").is_dir() or not any((run / "checkpoints").iterdir()):
        return
    before = read_run_file(run)
    changes = [
        f"{key}: was {before['manifest'].get(key)!r}, is {content['manifest'].get(key)!r}"
        for key in FIXED
        if before["manifest"].get(key) != content["manifest"].get(key) and key not in allow
    ]
    fingerprints = [[d["fingerprint"] for d in c["datasets"]] for c in (before, content)]
    if fingerprints[0] != fingerprints[1] and "datasets" not in allow:
        changes.append(f"datasets: their rows changed ({fingerprints[0]} -> {fingerprints[1]})")
    if changes:
        raise ValueError(
            "\n  ".join([f"{run}: its checkpoints are of another run:", *changes])
            + "\nset another `out`, remove the folder, or say --allow KEY to go on with the change"
        )


def _initial_params(init: InitFromRun, config: ModelConfig, content: dict[str, Any], mesh: Mesh) -> Any:
    """Parameters of the finished run `init.run`; ValueError where its model or tokenizer is another."""
    before = read_run_file(init.run)
    if before["tokenizer_fingerprint"] != content["tokenizer_fingerprint"]:
        raise ValueError(
            f"init: {init.run}: its model was trained with tokenizer {before['tokenizer_fingerprint'][:12]}, the data "
            f"are built with {content['tokenizer_fingerprint'][:12]}; build them with the model's tokenizer"
        )
    sizes = {key: value for key, value in asdict(config).items() if key not in ("rope_theta", "dtype", "remat")}
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


def _drop_metrics_after(run: Path, step: int) -> None:
    """Lines of steps that the checkpoint does not hold are forgotten; they will be done again."""
    path = run / METRICS
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):  # the last line of a killed run can be cut
            continue
    temporary = path.with_name(f".{METRICS}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


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
