"""Runs units: pieces of work that are functions of their inputs, each with one output file, whole or not there.

    units   u0 u1 u2 u3 ...      taken in order, a few at a time
    workers [u0] [u1]            spawned processes, this process alone, or a Ray cluster (lwm_data/ray_pool.py)
    results r0 r1 r2 r3 ...      in the units' order, whoever was faster

A unit's output is written whole or not at all (folder.py), so that a unit may be killed at any moment and run again.
Workers end when the build ends, also when it is killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from lwm_data.ray_pool import RayCluster, run_on_ray

Shared = TypeVar("Shared")
Unit = TypeVar("Unit")
Result = TypeVar("Result")

Workers = int | RayCluster
"""Processes of this machine (1: this one alone), or a cluster."""

AHEAD = 4  # units per worker that may be done before the one whose turn it is
PATIENCE = 5.0  # seconds that a worker has to clean up


def run_units(
    function: Callable[[Shared, Unit], Result],
    shared: Shared,
    units: Iterable[Unit],
    workers: Workers,
    most: int | None = None,
    model: bool = False,
) -> Iterator[Result]:
    """`function(shared, unit)` of each unit, in the units' order.

    `function` must be importable by name; `shared` goes to each worker once. An error ends the run, and so does
    closing the iterator; what the workers were writing is removed. most: more processes than this are of no use: each
    costs an interpreter and its imports. model: each worker keeps one, in memory or on a GPU.
    """
    if isinstance(workers, RayCluster):
        yield from run_on_ray(function, shared, units, workers, model)
        return
    if most is not None:
        workers = max(1, min(workers, most))
    if workers == 1:
        for unit in units:
            yield function(shared, unit)
        return
    pool = _Pool(function, shared, workers)
    try:
        yield from pool.run(units)
    finally:
        pool.stop()


def model_cores(workers: Workers, most: int) -> int:
    """Cores for each worker that keeps a model, where there are at most `most` of them."""
    if isinstance(workers, RayCluster):
        return workers.model_cores
    return max(1, len(os.sched_getaffinity(0)) // max(1, min(workers, most)))


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
