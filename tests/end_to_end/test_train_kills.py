"""Kills at random moments change nothing: the same rows, losses and parameters, bit for bit; of one process or two."""

from __future__ import annotations

import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
import pytest

from lwm_data.terminal import run_app
from lwm_train.checkpoint import restore_params
from lwm_train.cli import app
from lwm_train.config import MeshSpec
from lwm_train.mesh import make_mesh
from tests.end_to_end.training import losses, start, steps_logged, wait_for_step, write_train_manifest

RUN = ("-m", "lwm_train.cli", "run")


class Start(Protocol):
    def __call__(self, *arguments: object, cache: Path) -> subprocess.Popen[str]: ...


@pytest.fixture
def start_run() -> Iterator[Start]:
    """start_run(arguments of `lwm-train run`, cache=...); what still runs when the test is over is killed."""
    started: list[subprocess.Popen[str]] = []

    def make(*arguments: object, cache: Path) -> subprocess.Popen[str]:
        started.append(start(*RUN, *arguments, cache=cache))
        return started[-1]

    yield make
    for process in started:
        process.kill()
        process.communicate()


def params_of(run: Path) -> list[np.ndarray]:
    params, _ = restore_params(run, make_mesh(MeshSpec(), jax.devices()[:1]))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What the process says; it must end with `code`."""
    out, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return out + errors


def test_a_run_of_forty_steps_with_three_kills_is_the_undisturbed_run_bit_for_bit(
    project: Callable[..., Path], start_run: Start, tmp_path: Path
) -> None:
    manifest = write_train_manifest(project, steps=40, checkpoint={"every": 5, "keep": 2})
    folder, run = manifest.parent, manifest.parent / "run"
    finish(start_run(manifest, "--set", "out=straight", cache=tmp_path))
    draws = random.Random(1)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        process = start_run(manifest, cache=tmp_path)
        wait_for_step(run, (steps_logged(run) or [0])[-1] + draws.randint(1, 9), process)
        process.send_signal(number)
        if number == signal.SIGTERM:
            time.sleep(draws.random() / 10)
            process.send_signal(number)  # again, perhaps while it saves
        told = finish(process, 0 if number == signal.SIGTERM else -signal.SIGKILL)
        if number == signal.SIGTERM:
            saved = int(re.search(r"stopped by SIGTERM, saved at step (\d+)", told)[1])  # type: ignore[index]
            assert steps_logged(run)[-1] == saved
            assert (run / "checkpoints" / str(saved)).is_dir()
        assert steps_logged(run)[-1] < 40, "the signal came too late to test anything"
    finish(start_run(manifest, cache=tmp_path))
    assert steps_logged(run) == list(range(1, 41))
    assert losses(run) == losses(folder / "straight")
    for a, b in zip(params_of(run), params_of(folder / "straight"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_two_processes_train_as_one_and_when_one_dies_the_other_ends_and_both_go_on(
    project: Callable[..., Path], start_run: Start, tmp_path: Path
) -> None:
    manifest = write_train_manifest(project, steps=8, mesh={"fsdp": 2}, checkpoint={"every": 1, "keep": 3})
    folder, run = manifest.parent, manifest.parent / "run"
    assert run_app(app, ["run", str(manifest), "--set", "out=one"]) == 0

    def two() -> list[subprocess.Popen[str]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        options = ("--coordinator", address, "--num-processes", 2, "--process-id")
        return [start_run(manifest, *options, i, cache=tmp_path) for i in range(2)]

    processes = two()
    wait_for_step(run, 2, processes[0])
    processes[1].kill()
    begin = time.monotonic()
    processes[0].communicate(timeout=90)
    assert time.monotonic() - begin < 60
    assert processes[0].returncode not in (0, None)
    assert steps_logged(run)[-1] < 8, "the kill came too late to test anything"
    processes[1].communicate()
    for process in two():
        finish(process)
    assert steps_logged(run) == list(range(1, 9))
    np.testing.assert_allclose(losses(run), losses(folder / "one"), rtol=1e-5)
