"""lwm-data on a machine that fails: a script that tests run in the place of `lwm-data`, and its workers.

LWM_FAULT=kill:120    the process ends by SIGKILL in its 120th operation on a file; half of what it writes is written
LWM_FAULT=full:120    from its 120th operation on, every write finds the disk full
LWM_FAULT=io:0.01:7   each operation, with a chance of 0.01, is an input/output error; 7 is the seed
LWM_FAULT=count       nothing fails; the operations are counted in `done`

Operations are reads, writes, syncs, renames and removals below the folder LWM_FAULT_UNDER. What pyarrow reads through a
memory map is not seen here.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import signal
import sys
from collections.abc import Callable
from typing import Any

real_open, os_unlink = builtins.open, os.unlink
done = 0  # operations
kind, numbers, under = "count", [""], "/nowhere"
draws: random.Random | None = None


def install() -> None:
    """From now on this process sees what the environment asks for."""
    global kind, numbers, under, draws
    kind, *numbers = os.environ["LWM_FAULT"].split(":")
    under = os.environ["LWM_FAULT_UNDER"]
    draws = random.Random(int(numbers[1]) * 1000 + os.getpid() % 1000) if kind == "io" else None
    builtins.open = io.open = _open
    for name in ("replace", "unlink", "fsync", "mkdir"):
        setattr(os, name, _patched(getattr(os, name)))


def _fault(path: object, is_write: bool, half: Callable[[], object] = lambda: None) -> None:
    """Count an operation on `path`, and fail if it is its turn, after `half` of it."""
    global done
    done += 1
    if kind == "kill" and done == int(numbers[0]):
        half()
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "full" and done >= int(numbers[0]) and is_write:
        half()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    if draws is not None and draws.random() < float(numbers[0]):
        half()
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


class _File(io.FileIO):
    def readinto(self, buffer: Any, /) -> int:
        _fault(self.name, False)
        return super().readinto(buffer) or 0

    def readall(self) -> bytes:
        _fault(self.name, False)
        return super().readall() or b""

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        _fault(self.name, True, lambda: super(_File, self).write(view[: len(view) // 2]))
        return super().write(data) or 0


def _open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
    is_ours = isinstance(file, str | os.PathLike) and os.path.abspath(os.fspath(file)).startswith(under)
    if not is_ours or mode not in ("rb", "wb"):
        return real_open(file, mode, *args, **kwargs)
    if mode == "rb":
        return io.BufferedReader(_File(file, "r"))
    _fault(file, True)
    return io.BufferedWriter(_File(file, "w"))


def _patched(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(path: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(path, int):
            _fault(f"file {path}", True)
        elif os.path.abspath(os.fspath(path)).startswith(under):
            # A full disk lets names be removed; everything else needs room.
            _fault(path, function is not os_unlink)
        return function(path, *args, **kwargs)

    return call


if __name__ in ("__main__", "__mp_main__"):  # the latter in the worker processes
    install()
if __name__ == "__main__":
    from lwm_data.cli import app
    from lwm_data.terminal import run_app

    sys.exit(run_app(app))
