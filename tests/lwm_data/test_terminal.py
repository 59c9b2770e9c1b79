"""Exit codes, errors of one line, progress without a terminal."""

from __future__ import annotations

import errno
import os
import time

import pytest
import typer

from lwm_data import terminal
from lwm_data.terminal import Progress, RunFailed, run_app

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
        ("full", 1, "lwm-test: error: a.txt: No space left on device"),
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


def test_the_terminal_imports_nothing_of_the_project() -> None:
    assert os.path.basename(terminal.__file__) == "terminal.py"
    with open(terminal.__file__, encoding="utf-8") as file:
        assert not [line for line in file if line.startswith(("import lwm", "from lwm"))]
