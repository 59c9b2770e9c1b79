"""lwm-train run through its command line: exact resume after kills, and what wrong input is told."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lwm_data.terminal import run_app
from lwm_train.checkpoint import restore_params
from lwm_train.cli import app
from lwm_train.config import MeshSpec
from lwm_train.mesh import make_mesh

STEPS = 30


@pytest.fixture
def train_manifest(project: Callable[..., Path]) -> Callable[..., Path]:
    """train_manifest(key=value, ...) builds a small dataset and writes `train.yaml` beside it."""

    def make(name: str = "project", **keys: Any) -> Path:
        from lwm_data.build import build

        dataset = project(name)
        build(dataset, (), 1)
        manifest = {
            "kind": "train",
            "name": "small",
            "out": "run",
            "model": {"preset": "tiny"},
            "precision": "fp32",
            "data": [{"dataset": "out"}],
            "batch_rows": 2,
            "steps": STEPS,
            "mesh": {"sp": 2},
            "optimizer": {"lr": 1e-3, "warmup": 2},
            "checkpoint": {"every": 5, "keep": 2},
        } | keys
        path = dataset.parent / "train.yaml"
        path.write_text(json.dumps(manifest), encoding="utf-8")
        return path

    return make


def start(*args: object) -> subprocess.Popen[str]:
    env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-m", "lwm_train.cli", *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps_logged(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def test_ctrl_c_saves_and_exits_130(train_manifest: Callable[..., Path]) -> None:
    manifest = train_manifest(steps=2000, checkpoint={"every": 2000, "keep": 1})
    process = start("run", manifest)
    run = manifest.parent / "run"
    deadline = time.monotonic() + 150
    while len(steps_logged(run)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    saved = int(re.search(r"stopped by SIGINT, saved at step (\d+)", out)[1])  # type: ignore[index]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [str(saved)]
    assert steps_logged(run)[-1] == saved


def told(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """What the command says on stderr; it must end with exit code 2 and without a traceback."""
    capsys.readouterr()
    assert run_app(app, [str(arg) for arg in args]) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    return errors


def test_wrong_manifests_are_told_by_file_line_key_got_and_wanted(
    train_manifest: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = train_manifest()
    for override, wanted in [
        ("stepps=3", r"stepps: unknown key; wanted one of: .*steps.*did you mean `steps`"),
        ("optimizer.lrr=1", r"optimizer\.lrr: unknown key; .*did you mean `lr`"),
        ("steps=0", r"steps: got 0; wanted greater than or equal to 1"),
        ("model.preset=9z", r"model\.preset: got '9z'; wanted 'tiny', 'demo'"),
        ("data.0.dataset=nowhere", r"nowhere: no index\.json: not a dataset"),
        ("mesh.sp=3", r"mesh: sp: got 3; rows of 256 tokens"),
        ("seed=4294967296", r"seed: got 4294967296; wanted less than 4294967296"),
        ("loss.shares={text: 0, vision: 0}", r"loss\.shares: .*with both 0 nothing is trained"),
        ("mesh.sp=64", r"mesh: .*sp 64 = 64 devices; there are"),
        ("mesh.dp=4", r"batch_rows: got 2; wanted a multiple of dp x fsdp = 4"),
        ("steps", r"--set steps: wanted key=value"),
    ]:
        assert re.search(wanted, told(capsys, "run", manifest, "--set", override)), override
    assert re.search(r"nothing\.yaml: no such manifest", told(capsys, "run", manifest.parent / "nothing.yaml"))


def test_a_truncated_shard_ends_training_with_its_name(
    train_manifest: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = train_manifest()
    shard = manifest.parent / "out" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-700])
    assert re.search(r"shard-000000\.tar: .* bytes, the index says .*build again", told(capsys, "run", manifest))


def test_a_model_is_not_trained_on_from_data_of_another_tokenizer(
    train_manifest: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from lwm_data.build import build
    from lwm_data.text_training import train_text_tokenizer

    manifest = train_manifest(steps=2)
    assert run_app(app, ["run", str(manifest)]) == 0
    folder = manifest.parent
    train_text_tokenizer([str(folder / "books" / "*.txt")], 400, folder / "other.yaml")
    books = "sources=[{name: books, type: books, path: books/*.txt}]"
    build(folder / "dataset.yaml", ("text_tokenizer=other.yaml", "out=other-out", books), 1)
    errors = told(
        capsys, "run", manifest, "--set", "out=run2", "--set", "init={run: run}", "--set", "data.0.dataset=other-out"
    )
    assert re.search(
        r"init: .*run: its model was trained with tokenizer \w{12}, the data are built with \w{12}", errors
    )
    both = told(capsys, "run", manifest, "--set", "data=[{dataset: out}, {dataset: other-out}]", "--set", "out=run3")
    assert re.search(r"other-out: built with tokenizer \w{12}.*a model has one", both)


def test_a_run_folder_refuses_another_run_and_shows_the_difference(
    train_manifest: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = train_manifest(steps=2)
    assert run_app(app, ["run", str(manifest)]) == 0
    errors = told(capsys, "run", manifest, "--set", "optimizer.lr=0.5", "--set", "seed=9")
    assert re.search(r"seed: was 0, is 9", errors)
    assert re.search(r"optimizer: was .*0\.001.* is .*0\.5", errors)
    shutil.rmtree(manifest.parent / "run" / "checkpoints")
    assert run_app(app, ["run", str(manifest), "--set", "seed=9"]) == 0


def second_stage(manifest: Path) -> Path:
    """A manifest that starts from the run of `manifest`."""
    second = json.loads(manifest.read_text()) | {"name": "second", "out": "run2", "init": {"run": "run"}}
    path = manifest.parent / "second.yaml"
    path.write_text(json.dumps(second), encoding="utf-8")
    return path


def test_a_stage_is_refused_when_the_stage_before_it_was_trained_anew_even_if_it_was_gone_in_between(
    train_manifest: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = train_manifest(steps=2)
    second = second_stage(manifest)
    assert run_app(app, ["run", str(manifest)]) == 0
    assert run_app(app, ["run", str(second)]) == 0
    shutil.rmtree(manifest.parent / "run")
    assert run_app(app, ["run", str(second)]) == 0  # finished, and needs nothing of the run before
    assert run_app(app, ["run", str(manifest), "--set", "seed=4"]) == 0
    errors = told(capsys, "run", second)
    assert re.search(r"init: the run that this one started from was trained anew", errors)


def test_a_project_that_was_moved_goes_on(train_manifest: Callable[..., Path]) -> None:
    manifest = train_manifest(steps=2)
    second = second_stage(manifest)
    assert run_app(app, ["run", str(manifest)]) == 0
    assert run_app(app, ["run", str(second)]) == 0
    moved = manifest.parent.with_name("moved")
    manifest.parent.rename(moved)
    for name in ("train.yaml", "second.yaml"):
        assert run_app(app, ["run", str(moved / name)]) == 0


def test_a_step_that_is_not_finite_fails_the_run_and_is_never_saved(
    train_manifest: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = train_manifest(optimizer={"lr": 1e38, "weight_decay": 0}, checkpoint={"every": 1, "keep": 50})
    assert run_app(app, ["run", str(manifest)]) == 1
    assert re.search(r"step \d+: loss .* is not finite; nothing of it is saved", capsys.readouterr().err)
    folder = manifest.parent / "run"
    if (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir()):
        params, _ = restore_params(folder, make_mesh(MeshSpec(), jax.devices()[:1]))
        assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(params))


def test_what_allow_cannot_do_is_told(train_manifest: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    manifest = train_manifest(steps=2)
    assert run_app(app, ["run", str(manifest)]) == 0
    errors = told(capsys, "run", manifest, "--set", "steps=1", "--allow", "steps")
    assert re.search(r"steps: got 1; .*run has done 2 already; wanted 2 or more", errors)
    longer = ["--set", "steps=3", "--allow", "steps"]
    muon = ["--set", "optimizer={name: muon, lr: 0.01, adam_lr: 0.01}", "--allow", "optimizer"]
    assert re.search(
        r"another shape than the manifest asks for; start a new run", told(capsys, "run", manifest, *longer, *muon)
    )
    assert run_app(app, ["run", str(manifest), *longer]) == 0


def test_json_output_is_json_lines_and_bf16_trains(
    train_manifest: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = train_manifest(steps=2, precision="bf16")
    capsys.readouterr()
    assert run_app(app, ["run", str(manifest), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["step"] == 2
    assert run_app(app, ["generate", str(manifest.parent / "run"), "--tokens", "4"]) == 0


def test_an_evaluation_refuses_a_dataset_of_another_tokenizer(
    train_manifest: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = train_manifest(steps=2)
    assert run_app(app, ["run", str(manifest)]) == 0
    index = manifest.parent / "out" / "index.json"
    changed = json.loads(index.read_text()) | {"tokenizer_fingerprint": "f" * 64}
    index.write_text(json.dumps(changed), encoding="utf-8")
    evaluation = manifest.parent / "eval.yaml"
    evaluation.write_text(json.dumps({"kind": "eval", "name": "e", "run": "run", "heldout": "out"}), encoding="utf-8")
    assert re.search(
        r"out: built with tokenizer ffffffffffff, the model was trained with", told(capsys, "eval", evaluation)
    )


def test_a_run_folder_that_is_not_ours_is_told_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content, wanted in [
        ("{}", "name: missing"),
        ("[1", "not JSON"),
        ('{"name": "x", "manifest": 3}', "manifest: "),
    ]:
        (tmp_path / "run.json").write_text(content, encoding="utf-8")
        assert wanted in told(capsys, "report", tmp_path)
