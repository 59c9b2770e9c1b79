"""Exit codes, errors of one line, progress without a terminal."""

from __future__ import annotations

import errno
import json
import os
import time

import pytest
import typer

from lwm_data import terminal
from lwm_data.terminal import Progress, RunFailed, progress_as_json, run_app

ERRORS = {
    "value": ValueError("a.txt: got 1, wanted 2"),
    "missing": FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"),
    "full": OSError(errno.ENOSPC, "No space left on device", "a.txt"),
    "failed": RunFailed("loss is NaN"),
    "bug": KeyError("a.txt"),
    "stop": KeyboardInterrupt(),
}


def _app() -> typer.Typer:
    app = typer.Typer(name="lwm-test", no_args_is_help=True)

    @app.command()
    def fail(how: str) -> None:
        """Fail."""
        raise ERRORS[how]

    @app.command()
    def work(num: int = 1) -> None:
        """Work."""
        print("worked", num)

    return app


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("value", 2, "lwm-test: error: a.txt: got 1, wanted 2"),
        ("missing", 2, "lwm-test: error: a.txt: No such file or directory"),
        (
            "full",
            1,
            "lwm-test: error: a.txt: No space left on device; make room and run it again: what is finished is kept",
        ),
        ("failed", 1, "lwm-test: error: loss is NaN"),
        ("bug", 1, "lwm-test: error: KeyError: 'a.txt' (this is a bug; --debug shows where)"),
        ("stop", 130, ""),
    ],
)
def test_an_error_is_one_line_and_its_code(
    capsys: pytest.CaptureFixture[str], how: str, code: int, message: str
) -> None:
    assert run_app(_app(), ["fail", how]) == code
    assert capsys.readouterr().err.strip() == message


@pytest.mark.parametrize("args", [["--debug", "fail", "value"], ["fail", "value", "--debug"]])
def test_debug_anywhere_shows_the_traceback(args: list[str]) -> None:
    with pytest.raises(ValueError, match="wanted 2"):
        run_app(_app(), args)


@pytest.mark.parametrize("args", [["work", "--nmu", "1"], ["work", "--num", "x"], ["wrok"], ["fail"], []])
def test_wrong_usage_is_the_user_s_input(capsys: pytest.CaptureFixture[str], args: list[str]) -> None:
    assert run_app(_app(), args) == 2
    assert capsys.readouterr().err


def test_done_is_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(_app(), ["work", "--num", "3"]) == 0
    assert capsys.readouterr().out == "worked 3\n"
    assert run_app(_app(), ["work", "--help"]) == 0


def test_progress_without_a_terminal_is_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Progress("tokenize", total=40, unit="files") as progress:
        for _ in range(40):
            now[0] += 0.5
            progress.advance(1, "1.2M tokens/s")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "tokenize: 40 files"
    assert lines[1] == "tokenize: 10/40 files, 2.00/s, 15 s left, 1.2M tokens/s"
    assert lines[-1] == "tokenize: 40/40 files, 2.00/s in 20.0 s, 1.2M tokens/s"
    assert len(lines) == 6 and terminal.LINE_EVERY == 5.0


def test_progress_of_a_stopped_run_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), Progress("write", total=2, unit="rows") as progress:
        progress.advance(1)
        raise KeyboardInterrupt
    assert capsys.readouterr().err.rstrip().endswith("(stopped)")


def test_progress_for_scripts_is_json_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress_as_json(), Progress("tokenize", total=40, unit="units") as progress:
        for i in range(40):
            now[0] += 0.5
            progress.advance(1, "so many tokens", rejected=int(i == 3))
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(event["state"], event["done"]) for event in events] == [
        ("running", 0),
        *(("running", done) for done in (10, 20, 30, 40)),
        ("done", 40),
    ]
    assert events[0]["eta_s"] is None and events[0]["rejected"] == 0
    assert events[2] == {
        "stage": "tokenize",
        "state": "running",
        "done": 20,
        "total": 40,
        "unit": "units",
        "rate": 2.0,
        "eta_s": 10.0,
        "seconds": 10.0,
        "rejected": 1,
        "note": "so many tokens",
    }


def test_what_is_rejected_stands_in_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("tokenize", total=2, unit="units") as progress:
        progress.advance(1, "7 tokens", rejected=1200)
        progress.advance(1)
    assert capsys.readouterr().err.rstrip().endswith(", 7 tokens, 1,200 rejected")


def test_the_terminal_imports_nothing_of_the_project() -> None:
    assert os.path.basename(terminal.__file__) == "terminal.py"
    with open(terminal.__file__, encoding="utf-8") as file:
        assert not [line for line in file if line.startswith(("import lwm", "from lwm"))]


def test_where_nothing_is_done_no_time_of_one_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunFailed), Progress("ask", 4, "chunks"):
        raise RunFailed("no server")
    assert "ask: 0/4 chunks, 0/s in" in capsys.readouterr().err
