"""`lwm-data qa` asks `lwm-train serve`: questions about a novel by a model of our own, with no network."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from lwm_data.build import build
from lwm_data.cli import app as data_app
from lwm_data.terminal import run_app
from lwm_train.chat_protocol import ServedModel
from lwm_train.cli import app
from lwm_train.serve import load_model, serve
from tests.conftest import ROOT

ROW = 768


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that saw a few rows of a novel: enough to write, not to answer."""
    folder = tmp_path_factory.mktemp("model")
    dataset = {
        "kind": "dataset",
        "name": "alice",
        "out": "dataset",
        "row_length": ROW,
        "text_tokenizer": str(ROOT / "tokenizers" / "demo-text.yaml"),
        "sources": [{"name": "alice", "type": "books", "path": "alice.txt"}],
    }
    novel = (ROOT / "manifests" / "demo" / "novels" / "alice_in_wonderland.txt").read_text(encoding="utf-8")
    (folder / "alice.txt").write_text(novel[:20_000], encoding="utf-8")
    train = {
        "kind": "train",
        "name": "alice",
        "out": "run",
        "model": {"preset": "tiny"},
        "precision": "fp32",
        "data": [{"dataset": "dataset"}],
        "batch_rows": 1,
        "steps": 2,
        "optimizer": {"lr": 1e-3},
    }
    for name, manifest in (("dataset.yaml", dataset), ("train.yaml", train)):
        (folder / name).write_text(json.dumps(manifest), encoding="utf-8")
    build(folder / "dataset.yaml")
    assert run_app(app, ["run", str(folder / "train.yaml")]) == 0
    return folder / "run"


def start(module: str, *args: object) -> subprocess.Popen[str]:
    env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-m", module, *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@dataclass
class Serving:
    process: subprocess.Popen[str]
    said: dict[str, Any]  # when it was ready


@pytest.fixture(scope="module")
def serving(run: Path) -> Iterator[Serving]:
    process = start("lwm_train.cli", "serve", run, "--port", "0", "--name", "demo", "--json")
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate(timeout=20)[1]
    yield Serving(process, json.loads(line))
    if process.poll() is None:
        process.kill()
        process.communicate(timeout=20)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's own, elsewhere, so that what it writes lies there."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("manifests/qa", "manifests/demo/novels", "tokenizers"):
        shutil.copytree(ROOT / name, folder / name)
    return folder / "manifests" / "qa" / "demo.yaml"


def qa(manifest: Path, url: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What `lwm-data qa` says in the end."""
    sets = [f"endpoint.url={url}", "max_chunks=3", "chunk_tokens=100", "parameters.max_tokens=24"]
    sets += ["books=../demo/novels/alice*.txt", "endpoint.concurrency=1"]  # one shape or two to compile
    capsys.readouterr()
    assert run_app(data_app, ["qa", str(manifest), "--json", *(part for each in sets for part in ("--set", each))]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return said


def test_the_demos_questions_are_asked_of_our_own_server_and_the_counts_add_up(
    serving: Serving, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serving.said["context"] == ROW
    said = qa(manifest, serving.said["url"], capsys)
    folder = Path(said["out"]).parent
    journal = [json.loads(line) for line in (folder / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    rejected = [json.loads(line) for line in (folder / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = (folder / "qa.jsonl").read_text(encoding="utf-8").splitlines()
    assert said["answered"] == said["chunks"] == len(journal) == 3
    assert (said["failed"], said["remaining"]) == (0, 0)
    assert said["pairs"] == len(kept)
    assert sum(said["rejected"].values()) == len(rejected)
    assert len(kept) + len(rejected) >= len(journal)  # every answer is there, as pairs or as a rejection
    assert said["rejected"]["no pair in the answer"] >= 1  # two steps of training teach no JSON
    this_run = said["this_run"]
    assert this_run["input_tokens"] == said["input_tokens"] == sum(e["usage"]["prompt_tokens"] for e in journal)
    assert said["output_tokens"] == sum(entry["usage"]["completion_tokens"] for entry in journal)
    assert not any(entry["usage"]["estimated"] or entry["structured"] for entry in journal)
    assert {entry["finish_reason"] for entry in journal} <= {"stop", "length"}
    assert this_run["requests"] == len(journal) + 1 + sum(this_run["repeated"].values())  # one asked for a schema
    assert qa(manifest, serving.said["url"], capsys)["this_run"]["requests"] == 0


def test_ctrl_c_while_a_request_runs_ends_the_server_within_seconds(serving: Serving, run: Path) -> None:
    url, process = serving.said["url"], serving.process
    body = {"model": "demo", "prompt": "Alice", "max_tokens": 700, "temperature": 2, "stream": True}
    with httpx.stream("POST", f"{url}/completions", json=body, timeout=60) as response:
        events = response.iter_lines()
        next(events)
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        *_, last = (event for event in events if event)
    assert last == "data: [DONE]" or "the server is shutting down" in last
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - begin < 30  # 10 by its own clock, on a machine that is busy with other tests
    assert "Traceback" not in errors
    assert "SIGINT: ending" in errors
    statuses = Counter(re.findall(r"^POST /v1/\S+ (\d+)", errors, flags=re.MULTILINE))
    assert statuses["400"] == 1  # the schema, which qa asks for once
    assert statuses["200"] >= 4
    assert re.search(r"^generate: .* s were compiling, for a new shape", errors, flags=re.MULTILINE)


def test_sigterm_returns_and_gives_back_the_handlers(run: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    listed: list[str] = []

    def ready(url: str, model: ServedModel) -> None:
        listed.append(httpx.get(f"{url}/models").json()["data"][0]["id"])
        os.kill(os.getpid(), signal.SIGTERM)

    assert serve(lambda: load_model(run, None, None, 64), "127.0.0.1", 0, 4, ready) == signal.SIGTERM
    assert listed == ["alice"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_what_cannot_be_served_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert run_app(app, ["serve", str(run), "--port", str(port)]) == 2
        assert re.search(rf"--port {port}: .*name another port", capsys.readouterr().err)
    assert run_app(app, ["serve", str(tmp_path), "--port", "0"]) == 2
    assert "not a run" in capsys.readouterr().err
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "copy" / "metrics.jsonl").unlink()
    assert run_app(app, ["serve", str(tmp_path / "copy"), "--port", "0"]) == 2
    assert "--context" in capsys.readouterr().err
    assert load_model(tmp_path / "copy", "x", 99, 500).served.max_tokens == 98
