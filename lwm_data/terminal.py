"""What both command lines share: exit codes, errors as one line, progress. Imports nothing of the project.

lwm-data: tokenize: 3/12 files, 41% of bytes ...          progress, on stderr
lwm-data: error: demo.yaml:7: ...                         an error, on stderr

exit code   0 done   1 a bug or a failed run   2 the user's input   130 Ctrl-C
"""

from __future__ import annotations

import errno
import os
import sys
import time
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
        return (2 if error.errno in USER_ERRNOS else 1), f"{where}{error.strerror or error}"
    return 1, f"{type(error).__name__}: {error} (this is a bug; --debug shows where)"


class Progress:
    """Shows how far a loop is, on stderr: a bar in a terminal, otherwise a line at most every LINE_EVERY seconds.

    with Progress("tokenize", total=12, unit="files") as progress:
        progress.advance(1, "1.2M tokens/s")
    """

    def __init__(self, name: str, total: int, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = 0
        self.note = ""
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        self._start = self._last = time.monotonic()
        console = Console(stderr=True)
        if console.is_terminal:
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

    def advance(self, count: int, note: str = "") -> None:
        """`count` more are done; `note` (a rate, a loss) stands beside the count."""
        self.done += count
        self.note = note or self.note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=self.note, rate=self._rate())
        elif (now := time.monotonic()) - self._last >= LINE_EVERY:
            self._last = now
            print(self._line(), file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.total:
            state = "" if kind is None else " (stopped)"
            print(f"{self._line()}{state}", file=sys.stderr, flush=True)

    def _rate(self) -> str:
        rate = self.done / max(time.monotonic() - self._start, 1e-9)
        return (
            f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2f}/s" if rate >= 0.1 else f"{1 / max(rate, 1e-9):.0f} s each"
        )

    def _line(self) -> str:
        seconds = time.monotonic() - self._start
        left = seconds / self.done * (self.total - self.done) if self.done else 0.0
        when = f", {left:.0f} s left" if 0 < self.done < self.total else f" in {seconds:.1f} s"
        note = f", {self.note}" if self.note else ""
        return f"{self.name}: {self.done:,}/{self.total:,} {self.unit}, {self._rate()}{when}{note}"
