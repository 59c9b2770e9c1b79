"""A curriculum of two stages, its evaluation and its report, through the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lwm_data.format.dataset import open_dataset
from lwm_data.terminal import run_app
from lwm_train.cli import app

BOOKS = "sources=[{name: books, type: books, path: books/*.txt}]"


def write(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(keys), encoding="utf-8")  # JSON is YAML


@pytest.fixture
def folder(project: Callable[..., Path]) -> Path:
    """Two datasets (`out`, `held`), two stages, a curriculum and an evaluation."""
    from lwm_data.build import build

    dataset = project()
    build(dataset)
    build(dataset, (BOOKS, "out=held", "name=held", "loss_weighting=token"))
    folder = dataset.parent
    stage: dict[str, Any] = {"kind": "train", "model": {"preset": "tiny"}, "precision": "fp32", "batch_rows": 2}
    stage |= {"data": [{"dataset": "out"}], "steps": 2, "mesh": {"sp": 2}}
    write(folder / "a.yaml", name="short", out="short", **stage)
    write(folder / "b.yaml", name="long", out="long", seed=1, **stage)
    write(folder / "train.yaml", kind="curriculum", name="both", stages=["a.yaml", "b.yaml"])
    needle = {"haystack": "books/*.txt", "lengths": [128], "depths": [0, 1], "rounds": 1}
    samples = {"prompts": ["Alice was"], "num_tokens": 5}
    parts = {"heldout": "held", "ngram_baselines": "out", "needle": needle, "samples": samples}
    write(folder / "eval.yaml", kind="eval", name="all", run="long", **parts)
    return folder


def lines(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """What the command prints; it must succeed."""
    capsys.readouterr()
    assert run_app(app, [str(arg) for arg in args]) == 0
    return capsys.readouterr().out


def test_a_curriculum_is_trained_evaluated_once_and_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, page = folder / "long", folder / "report.html"
    lines(capsys, "run", folder / "train.yaml")
    lines(capsys, "report", run, "--out", page)
    assert "Held-out" not in page.read_text() and "held out" not in page.read_text(), "nothing is evaluated yet"

    result = json.loads(lines(capsys, "eval", folder / "eval.yaml", "--json"))
    before = (run / "eval.json").stat().st_mtime_ns
    assert json.loads(lines(capsys, "eval", folder / "eval.yaml", "--json")) == result
    assert (run / "eval.json").stat().st_mtime_ns == before, "an evaluation that is there is not repeated"

    lines(capsys, "report", run, "--out", page)
    words = page.read_text(encoding="utf-8")
    trained, held = open_dataset(folder / "out"), open_dataset(folder / "held")
    logs = [(folder / name / "metrics.jsonl").read_text().splitlines() for name in ("short", "long")]
    steps = [(step["stage"], step["step"]) for step in map(json.loads, logs[0] + logs[1])]
    assert steps == [("short", 1), ("short", 2), ("long", 1), ("long", 2)]
    wanted = [f"{loss:.3f}" for loss in (result["heldout"]["text_loss"], *result["ngram"].values())]
    wanted += [f"{result['heldout']['num_text']:,}", f"wanted {result['needle']['answers'][0]['number']}"]
    wanted += [f"{4 * 2 * 256:,}</b><span>tokens trained on", "manifest of short", "manifest of long", "sp 2"]
    wanted += [trained.info.fingerprint[:12], held.info.fingerprint[:12], "held out", "after step 2"]
    wanted += ["Alice was"]
    assert [number for number in wanted if number not in words] == []
    assert "not found" not in words

    shutil.rmtree(folder / "out")
    shutil.rmtree(folder / "short")
    lines(capsys, "report", run, "--out", page)
    words = page.read_text(encoding="utf-8")
    assert "not found: the stage before long" in words and f"{folder / 'out'}: no index.json" in words
    assert wanted[0] in words and held.info.fingerprint[:12] in words
