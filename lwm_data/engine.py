"""Runs units: pieces of work that are functions of their inputs, each with one output file, whole or not there.

    units   u0 u1 u2 u3 ...      taken in order, a few at a time
    workers [u0] [u1]            spawned processes, or this process alone
    results r0 r1 r2 r3 ...      in the units' order, whoever was faster

A unit's output is written to a temporary name, fsynced and renamed, so that a unit may be killed at any moment and
run again. Workers end when the build ends, also when it is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from uuid import uuid4

Shared = TypeVar("Shared")
Unit = TypeVar("Unit")
Result = TypeVar("Result")

AHEAD = 4  # units per worker that may be done before the one whose turn it is
PATIENCE = 5.0  # seconds that a worker has to clean up


def run_units(
    function: Callable[[Shared, Unit], Result], shared: Shared, units: Iterable[Unit], workers: int
) -> Iterator[Result]:
    """`function(shared, unit)` of each unit, in the units' order, in `workers` processes (1: in this one).

    `function` must be importable by name; `shared` goes to each worker once. An error ends the run, and so does
    closing the iterator; what the workers were writing is removed.
    """
    if workers == 1:
        for unit in units:
            yield function(shared, unit)
        return
    pool = _Pool(function, shared, workers)
    try:
        yield from pool.run(units)
    finally:
        pool.stop()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that stands at `path` only once the block has ended well; fsynced, then renamed.

    While it is written the temporary is locked, so that `remove_leftovers` takes only those of the dead.
    """
    # Process numbers repeat: builds in two containers, or on two machines, may share a folder.
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    with _open_locked(temporary) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _open_locked(path: Path) -> BinaryIO:
    while True:
        file = open(path, "wb")  # noqa: SIM115 (the caller closes it)
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # another build took it for a leftover between the two calls


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporaries in `folder` that nobody is writing any more."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


class _Pool:
    def __init__(self, function: Callable[[Any, Any], Any], shared: Any, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.processes: list[SpawnProcess] = []
        self.connections: list[Connection] = []
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(function, shared, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)

    def run(self, units: Iterable[Any]) -> Iterator[Any]:
        todo = iter(enumerate(units))
        idle = list(self.connections)
        busy: dict[Connection, int] = {}
        done: dict[int, Any] = {}
        turn = 0
        exhausted = False
        while True:
            while idle and not exhausted and len(busy) + len(done) < AHEAD * len(self.processes):
                try:
                    number, unit = next(todo)
                except StopIteration:
                    exhausted = True
                    break
                connection = idle.pop(0)
                with self._alive(connection):
                    connection.send(unit)
                busy[connection] = number
            while turn in done:
                yield done.pop(turn)
                turn += 1
            if not busy and exhausted:
                return
            if busy:
                for ready in wait(list(busy)):
                    assert isinstance(ready, Connection)
                    done[busy.pop(ready)] = self._receive(ready)
                    idle.append(ready)

    def _receive(self, connection: Connection) -> Any:
        with self._alive(connection):
            error, result = connection.recv()
        if error is not None:
            raise error
        return result

    @contextlib.contextmanager
    def _alive(self, connection: Connection) -> Iterator[None]:
        """Around send and recv: a worker that died idle breaks the one, at work the other."""
        try:
            yield
        except (EOFError, OSError):
            process = self.processes[self.connections.index(connection)]
            process.join(PATIENCE)
            raise OSError(
                f"a worker ended unexpectedly (exit code {process.exitcode}; -9 often means out of memory); "
                "run again with fewer --workers, finished work is kept"
            ) from None

    def stop(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()


def _work(function: Callable[[Any, Any], Any], shared: Any, connection: Connection) -> None:
    """A worker: takes units until its connection closes; SIGTERM unwinds it, so that temporaries are removed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops us
    signal.signal(signal.SIGTERM, _unwind)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    while True:
        try:
            unit = connection.recv()
        except (EOFError, OSError):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to unwind, and exit hooks must not be
            return
        try:
            reply: tuple[Exception | None, Any] = (None, function(shared, unit))
        except Exception as error:
            error.__traceback__ = None
            reply = (error, None)
        try:
            connection.send(reply)
        except OSError:
            return
        except (AttributeError, TypeError) as error:  # an exception that cannot be pickled
            connection.send((RuntimeError(f"{reply[0]!r} ({error})"), None))


def _unwind(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _die_with_parent() -> None:
    """A killed build must not go on writing behind the back of the next one."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
