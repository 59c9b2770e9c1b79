"""What both command lines share: exit codes, errors as one line, progress. Imports nothing of the project.

tokenize: 3/12 units, 2.00/s, 5 s left, 1,204 tokens      progress, on stderr; {"stage": "tokenize", ...} for scripts
lwm-data: error: demo.yaml:7: ...                         an error, on stderr

exit code   0 done   1 a bug or a failed run   2 the user's input   130 Ctrl-C
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from types import TracebackType

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LINE_EVERY = 5.0  # seconds between progress lines where stderr is no terminal
USER_ERRNOS = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EROFS, errno.ENAMETOOLONG)


class RunFailed(Exception):
    """The input was right but the run did not succeed; the message is for the user. Exit code 1."""


def run_app(app: typer.Typer, args: list[str] | None = None) -> int:
    """Run the command line `app` on `args` (default: the process's own) and return the exit code.

    No traceback unless `--debug` stands among the arguments, before or after the verb.
    """
    args = list(sys.argv[1:] if args is None else args)
    options = args[: args.index("--")] if "--" in args else args
    debug = "--debug" in options
    args = [arg for arg in options if arg != "--debug"] + args[len(options) :]
    name = app.info.name if isinstance(app.info.name, str) else os.path.basename(sys.argv[0])
    app.info.epilog = app.info.epilog or "`--debug`, anywhere, shows the traceback of an error."
    try:
        result = typer.main.get_command(app).main(args=args, prog_name=name, standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `lwm-data show ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        code, message = _explain(error)
        if message:
            print(f"{name}: error: {message}", file=sys.stderr)
        return code


def _explain(error: Exception) -> tuple[int, str]:
    """Exit code and message of an error that ended a run."""
    if isinstance(error, typer.TyperException):
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
            return 2, ""
        return 2, f"{error.format_message()} (--help shows what is possible)"
    if isinstance(error, typer.Abort):
        return 130, ""
    if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
        return 2, str(error)
    if isinstance(error, RunFailed):
        return 1, str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        remedy = "; make room and run it again: what is finished is kept" if error.errno == errno.ENOSPC else ""
        return (2 if error.errno in USER_ERRNOS else 1), f"{where}{error.strerror or error}{remedy}"
    return 1, f"{type(error).__name__}: {error} (this is a bug; --debug shows where)"


_AS_JSON = ContextVar("progress as JSON lines", default=False)


@contextlib.contextmanager
def progress_as_json(wanted: bool = True) -> Iterator[None]:
    """While the block lasts, progress is JSON lines, for scripts."""
    token = _AS_JSON.set(wanted)
    try:
        yield
    finally:
        _AS_JSON.reset(token)


class Progress:
    """Shows how far a loop is, on stderr: a bar in a terminal, otherwise a line at most every LINE_EVERY seconds.

    with Progress("tokenize", total=12, unit="files") as progress:
        progress.advance(1, "1.2M tokens/s", rejected=3)

    Under `progress_as_json` each line is an object: stage, state (running, done, stopped), done, total, unit, rate (of
    the unit, a second), eta_s (null where nothing is done), seconds, rejected (records), note.
    """

    def __init__(self, name: str, total: int, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = self.rejected = 0
        self.note = ""
        self._bar: RichProgress | None = None
        self._as_json = _AS_JSON.get()

    def __enter__(self) -> Progress:
        self._start = self._last = time.monotonic()
        console = Console(stderr=True)
        if self._as_json:
            self._print_json("running")
        elif console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(f"{self.unit} {{task.fields[rate]}}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self._task = self._bar.add_task(self.name, total=self.total, rate="", note="")
            self._bar.start()
        else:
            print(f"{self.name}: {self.total:,} {self.unit}", file=sys.stderr, flush=True)
        return self

    def advance(self, count: int, note: str = "", rejected: int = 0) -> None:
        """`count` more are done; `note` (a rate, a loss) stands beside the count; `rejected` more records are bad."""
        self.done += count
        self.note = note or self.note
        self.rejected += rejected
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=self._notes(), rate=self._rate())
        elif (now := time.monotonic()) - self._last >= LINE_EVERY:
            self._last = now
            if self._as_json:
                self._print_json("running")
            else:
                print(self._line(), file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        if self._as_json:
            self._print_json("done" if kind is None else "stopped")
        elif self._bar is not None:
            self._bar.stop()
        elif self.total:
            state = "" if kind is None else " (stopped)"
            print(f"{self._line()}{state}", file=sys.stderr, flush=True)

    def _rate(self) -> str:
        if not self.done:
            return "0/s"
        rate = self.done / max(time.monotonic() - self._start, 1e-9)
        return (
            f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2f}/s" if rate >= 0.1 else f"{1 / max(rate, 1e-9):.0f} s each"
        )

    def _line(self) -> str:
        seconds = time.monotonic() - self._start
        when = f", {self._seconds_left():.0f} s left" if 0 < self.done < self.total else f" in {seconds:.1f} s"
        note = f", {notes}" if (notes := self._notes()) else ""
        return f"{self.name}: {self.done:,}/{self.total:,} {self.unit}, {self._rate()}{when}{note}"

    def _notes(self) -> str:
        return ", ".join(filter(None, (self.note, f"{self.rejected:,} rejected" if self.rejected else "")))

    def _seconds_left(self) -> float:
        return (time.monotonic() - self._start) / self.done * (self.total - self.done) if self.done else 0.0

    def _print_json(self, state: str) -> None:
        seconds = time.monotonic() - self._start
        event = {
            "stage": self.name,
            "state": state,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "rate": round(self.done / max(seconds, 1e-9), 3),
            "eta_s": round(self._seconds_left(), 1) if self.done else None,
            "seconds": round(seconds, 3),
            "rejected": self.rejected,
            "note": self.note,
        }
        print(json.dumps(event), file=sys.stderr, flush=True)
