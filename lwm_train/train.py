"""Train the stages of a manifest, top to bottom: make or restore the state, step, save.

A run goes on where it was: the newest whole checkpoint says which step is next, and the loader needs nothing else.
SIGTERM saves and ends well; the first Ctrl-C saves and ends, the second ends at once.

    wait for a batch | step | evaluate, now and then | a line of metrics | save, now and then      goodput.py has laps
"""

from __future__ import annotations

import math
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax

from lwm_data.terminal import Progress, RunFailed
from lwm_train.checkpoint import Checkpoints
from lwm_train.config import TrainManifest
from lwm_train.evaluate.while_training import WhileTraining
from lwm_train.flops import live_work
from lwm_train.goodput import Goodput
from lwm_train.identity import check_unchanged
from lwm_train.mesh import request_devices
from lwm_train.metrics import MetricsLog, StepTimes, drop_metrics_after
from lwm_train.model import num_params
from lwm_train.processes import any_of, is_first, meet
from lwm_train.run_file import write_run_file
from lwm_train.stage import Stage, open_stage
from lwm_train.step import TrainState
from lwm_train.watchdog import Watchdog


@dataclass(frozen=True)
class StageResult:
    """How a stage ended. stopped: by a signal, before its last step."""

    run: Path
    step: int
    stopped: str | None
    loss: float | None
    seconds: float


def train_stages(
    stages: Sequence[TrainManifest], allow: Sequence[str] = (), profile: range | None = None
) -> list[StageResult]:
    """Train each stage in turn; a finished stage is passed over. Ends early when a signal asks.

    profile: steps of each stage whose trace is written to RUN/profile.
    """
    request_devices([stage.mesh for stage in stages])
    results = []
    with _signals() as asked:
        for stage in stages:
            results.append(_train_stage(stage, allow, asked, profile))
            if results[-1].stopped:
                break
    return results


def _train_stage(manifest: TrainManifest, allow: Sequence[str], asked: list[str], profile: range | None) -> StageResult:
    stage = open_stage(manifest)
    check_unchanged(stage.run, stage.content, allow)
    mesh = stage.mesh
    begin = time.monotonic()
    if is_first():
        stage.run.mkdir(parents=True, exist_ok=True)
    meet("the run's folder is there")
    with _memory_explained(manifest), Checkpoints(stage.run, manifest.checkpoint) as checkpoints:
        newest = checkpoints.latest_step()
        if newest is not None and newest > manifest.steps:
            raise ValueError(
                f"steps: got {manifest.steps}; {stage.run} has done {newest} already; wanted {newest} or more"
            )
        if newest == manifest.steps:
            return StageResult(stage.run, newest, None, None, 0.0)
        goodput = Goodput(stage.run, is_first())
        goodput.lap("start")
        state = checkpoints.restore_newest(stage.layout())
        if state is None:
            state = stage.first_state()
        done = int(state.step)
        goodput.lap("restore")
        if is_first():
            device = mesh.devices.flat[0].device_kind
            write_run_file(stage.run, stage.content | {"mesh": dict(mesh.shape), "device": device})
            stage.tokenizer.save(stage.run)
            goodput.redo(drop_metrics_after(stage.run, done))
            print(_headline(stage, state, done), file=sys.stderr, flush=True)
        while_training = WhileTraining(manifest.evaluate, stage.config, stage.content, mesh)
        loader = stage.loader()
        log = MetricsLog(manifest, stage.config, mesh, stage.run, stage.row_length)
        step = done
        if profile is not None:
            profile = range(max(profile.start, done + 1), min(profile.stop, manifest.steps + 1))
        with (
            log,
            Progress(f"train {manifest.name}", manifest.steps - done, "steps") as progress,
            Watchdog(stage.run, manifest.watchdog) as watchdog,
        ):
            for step, batch in enumerate(loader.batches(done, manifest.steps), start=done + 1):
                goodput.lap("wait")
                with _profiled(step, profile, stage.run):
                    state, report = stage.train_step(state, batch)
                    work = live_work(batch)
                    jax.block_until_ready((state, report, work))
                is_new = step == done + 1
                seconds = goodput.lap("compile" if is_new else "train")
                heldout = while_training.loss(step, state.params, watchdog.beat)
                if heldout is not None:
                    goodput.lap("evaluate")
                times = StepTimes(seconds, is_new, loader.seconds_waited, goodput.share())
                progress.advance(1, log.write(step, report, work, times, heldout))
                watchdog.beat()
                stop = any_of(bool(asked))
                if step % manifest.checkpoint.every == 0 or step == manifest.steps or stop:
                    checkpoints.save(step, state)
                    goodput.lap("save")
                    watchdog.beat()
                if stop:
                    if profile and step in profile[:-1]:
                        jax.profiler.stop_trace()
                    asked = asked or ["SIGTERM"]  # another process heard it
                    break
            checkpoints.wait()
            goodput.lap("save")
            if is_first():
                goodput.write()
    return StageResult(stage.run, step, asked[0] if asked else None, log.loss, time.monotonic() - begin)


def _headline(stage: Stage, state: TrainState, done: int) -> str:
    manifest, mesh = stage.manifest, stage.mesh
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    device = mesh.devices.flat[0]
    return (
        f"{manifest.name}: {num_params(state.params):,} parameters, rope theta {stage.config.rope_theta:g}; "
        f"{mesh.size} {device.platform} device{'s' if mesh.size > 1 else ''} ({axes}); "
        f"{manifest.batch_rows} rows of {stage.row_length:,} tokens a step; "
        f"{'from step ' + str(done) if done else manifest.steps} of {manifest.steps} steps"
    )


@contextmanager
def _profiled(step: int, steps: range | None, run: Path) -> Iterator[None]:
    """The trace of `steps`, from the first one's begin to the last one's end; Perfetto opens it."""
    if steps and step == steps.start:
        jax.profiler.start_trace(run / "profile", create_perfetto_trace=True)
    yield
    if steps and step == steps.stop - 1:
        jax.profiler.stop_trace()


@contextmanager
def _memory_explained(manifest: TrainManifest) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Out of memory" not in str(error):
            raise
        asked = re.search(r"allocat\w+ (\d[\d.]*\s?\w*)", str(error))
        m = manifest
        devices = math.prod(size for size in (m.mesh.dp, m.mesh.fsdp, m.mesh.tp, m.mesh.sp) if size != -1)
        raise RunFailed(
            f"{m.name}: a device's memory is too small{f' (for another {asked[1]})' if asked else ''}: batch_rows "
            f"{m.batch_rows}, accumulate {m.accumulate}, remat {m.remat}, {devices} devices. What helps, the cheapest "
            "first: `accumulate` (parts of a batch in turn), fewer batch_rows, `remat: block` or offload, `mesh`: more "
            "fsdp spreads parameters and optimizer, more sp spreads a row's tokens. Nothing that was saved is lost"
        ) from error


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
