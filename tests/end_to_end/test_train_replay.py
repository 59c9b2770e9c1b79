"""What a run tells of itself: metrics, held-out loss, a trace, goodput, and the same step once more."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from lwm_data.build import build
from lwm_data.format.dataset import open_dataset
from lwm_data.terminal import run_app
from lwm_train.checkpoint import restore_params
from lwm_train.cli import app
from lwm_train.config import MeshSpec
from lwm_train.evaluate.heldout import heldout_loss
from lwm_train.loader import rows_at
from lwm_train.mesh import make_mesh
from lwm_train.run_file import run_model_config
from tests.end_to_end.training import losses, steps_logged, write_train_manifest


def test_a_run_tells_what_it_did_and_does_any_step_of_it_again(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_train_manifest(project, evaluate={"every": 6, "dataset": "heldout", "rows": 5})
    folder, run = manifest.parent, manifest.parent / "run"
    sources = "sources=[{name: chats, type: chats, path: chats.jsonl},{name: more, type: books, path: books/book3.txt}]"
    build(folder / "dataset.yaml", ("out=heldout", sources), 1)
    assert run_app(app, ["run", str(manifest), "--profile", "3:4"]) == 0

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    rows = len(open_dataset(folder / "out"))
    for line in lines:
        assert line["tokens"] == line["step"] * 256
        assert 0 < line["trained_tokens"] < line["live_tokens"] <= 256
        assert line["tokens_per_s"] == pytest.approx(256 / line["seconds"], rel=1e-3)
        assert line["mfu"] is None  # nobody has told what a CPU can do
        assert 0 <= line["starvation"] <= 1
        assert 0 <= line["goodput"] <= 1
    heldout = {line["step"]: line["heldout"] for line in lines if "heldout" in line}
    assert list(heldout) == [6, 12]
    assert set(heldout[12]["by_source"]) <= {"chats", "more"}
    params, step = restore_params(run, make_mesh(MeshSpec(), jax.devices()[:1]))
    assert step == 12
    if len(open_dataset(folder / "heldout")) == 5:
        config = run_model_config(run)
        whole = heldout_loss(params, config, open_dataset(folder / "heldout"), make_mesh(MeshSpec()), 5)
        assert heldout[12]["text_loss"] == pytest.approx(whole.text_loss, rel=1e-5)

    (trace,) = (run / "profile").rglob("perfetto_trace.json.gz")
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    (session,) = json.loads((run / "goodput.json").read_text())["sessions"]
    assert session["train"] > 0
    assert session["wall"] >= session["train"] + session["compile"] + session["save"] + session["evaluate"]

    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file())
    capsys.readouterr()
    assert run_app(app, ["replay", str(run), "--step", "10", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["from_checkpoint"] == 8
    assert again["loss"] == again["logged_loss"] == lines[9]["loss"]
    assert again["grad_norm"] == lines[9]["grad_norm"]
    assert [row["row"] for row in again["rows"]] == [a.row for a in rows_at(0, 9, 2, [rows], [1.0])]
    assert all(row["examples"] and row["examples"][0]["source"] == "books" for row in again["rows"])
    assert run_app(app, ["replay", str(run), "--step", "2"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"step 2: loss [\d.]+, equal to the log \(from checkpoint 0\)\n  .*out row \d+: shard-0000", shown)
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()) == before
    assert run_app(app, ["replay", str(run), "--step", "13"]) == 2
    assert "steps 1 to 12" in capsys.readouterr().err


def test_a_run_goes_on_on_other_meshes_with_the_losses_of_one(project: Callable[..., Path]) -> None:
    manifest = write_train_manifest(project, checkpoint={"every": 4, "keep": 50})
    folder = manifest.parent
    assert run_app(app, ["run", str(manifest), "--set", "out=straight"]) == 0
    straight = losses(folder / "straight")
    (folder / "straight").rename(folder / "run")
    for mesh, newest in (("{fsdp: 2}", 4), ("{sp: 4}", 8)):
        for checkpoint in (folder / "run" / "checkpoints").iterdir():
            if int(checkpoint.name) > newest:
                checkpoint.rename(folder / f"gone-{mesh}-{checkpoint.name}")
        assert run_app(app, ["run", str(manifest), "--set", f"mesh={mesh}"]) == 0
        assert steps_logged(folder / "run") == list(range(1, 13))
        assert losses(folder / "run") == pytest.approx(straight, rel=2e-5)
