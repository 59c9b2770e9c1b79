"""Jobs that each do a share of a build's units, and the events that scripts read while a build runs."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lwm_data.build import build, build_share
from lwm_data.cli import app
from lwm_data.terminal import run_app
from lwm_data.unit_range import parse_unit_range

ROOT = Path(__file__).parents[2]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_shares_and_a_last_build_give_the_bytes_of_one_build(project: Callable[..., Path]) -> None:
    whole = build(project("whole")).out
    manifest = project("shared")
    done = [build_share(manifest, parse_unit_range(f"{share}/3")) for share in (1, 2, 3)]
    assert sum(share.num_units for share in done) == done[0].num_planned == 6
    assert not (manifest.parent / "out").exists(), "a share touches the token store alone"
    assert _bytes(manifest.parent / "token-store") == _bytes(whole.parent / "token-store")
    assert _bytes(build(manifest).out) == _bytes(whole)


def test_a_share_reads_its_own_input_alone(project: Callable[..., Path]) -> None:
    sources = [{"name": "books", "type": "books", "path": "books/*.txt"}]
    manifest = project(sources=sources)
    (manifest.parent / "books" / "book3.txt").chmod(0)
    (manifest.parent / "books" / "book3.txt").unlink()
    (manifest.parent / "books" / "book3.txt").symlink_to(manifest.parent / "books" / "book0.txt")
    build_share(manifest, parse_unit_range("0:1"))
    assert len(list((manifest.parent / "token-store").glob("*.arrow"))) == 1


def test_a_share_from_the_command_line_says_what_remains(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = str(project())
    assert run_app(app, ["build", manifest, "--unit-range", "1/3"]) == 0
    assert "2 of 6 units are in" in capsys.readouterr().out.replace("\n", " ")
    assert run_app(app, ["build", manifest, "--unit-range", "0/3"]) == 2
    assert "--unit-range: got 0/3" in capsys.readouterr().err


def test_the_slurm_script_gives_each_job_its_share_and_the_last_one_the_rest(tmp_path: Path) -> None:
    shown = tmp_path / "bin"
    shown.mkdir()
    (shown / "lwm-data").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (shown / "lwm-data").chmod(0o755)

    def words(*arguments: str, **environment: str) -> list[str]:
        path = {"PATH": f"{shown}:{os.environ['PATH']}"}
        command = ["bash", str(ROOT / "deploy" / "slurm-build.sh"), *arguments]
        return subprocess.run(command, env=path | environment, capture_output=True, text=True).stdout.split()

    job = {"SLURM_CPUS_PER_TASK": "16", "SLURM_ARRAY_TASK_ID": "3"}
    assert words("a.yaml", "64", **job) == ["build", "a.yaml", "--workers", "16", "--unit-range", "3/64"]
    assert words("a.yaml", "--set", "seed=1") == ["build", "a.yaml", "--workers", "1", "--set", "seed=1"]
    assert words("a.yaml", **job) == [], "the number of shares is wanted"
    assert words() == []


def test_with_json_the_progress_is_events_and_the_result_alone_is_on_stdout(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = project()
    with open(manifest.parent / "chats.jsonl", "a") as chats:
        chats.write("no chat\n")
    assert run_app(app, ["build", str(manifest), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["built"] is True
    events = [json.loads(line) for line in printed.err.splitlines()]
    assert [event["stage"] for event in events if event["state"] == "done"] == ["read input", "tokenize", "write rows"]
    (tokenized,) = [event for event in events if event["stage"] == "tokenize" and event["state"] == "done"]
    assert (tokenized["done"], tokenized["total"], tokenized["unit"], tokenized["rejected"]) == (6, 6, "units", 1)
    assert {"rate", "eta_s", "seconds"} <= tokenized.keys()
