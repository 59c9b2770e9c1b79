"""Runs units on a Ray cluster: those that lwm_data/engine.py runs in processes of this machine, with the same results.

    units    u0 u1 u2 u3 ...      taken in order, a bounded number at a time
    tasks    [u0] [u1] [u3]       one CPU each, spread over the machines; Ray runs one again whose machine is lost
    actors   [u0] [u1]            where units need a model: it stays loaded, on a GPU where there are any
    results  r0 r1 r2 r3 ...      in the units' order, whoever was faster

A unit's output stands whole or not at all, and is a function of the unit, so to run one again is always right, also
while the lost one still writes. Input, token store and dataset must be where all machines see them under one path.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

AHEAD = 4  # units per worker that may be done before the one whose turn it is
QUEUED = 2  # tasks per CPU that Ray holds, so that no CPU waits for us
RETRIES = 3  # of a unit that was lost with its worker
MODEL_CORES = 4  # of a worker that holds a model, where there is no GPU
PATIENCE = 5.0  # seconds that tasks have to clean up


@dataclass(frozen=True)
class RayCluster:
    """Where units run: a cluster that this process is connected to. most: units at a time; None: as it has room for."""

    address: str
    most: int | None = None

    @property
    def model_cores(self) -> int:
        """CPUs of each worker that holds a model."""
        return _model_workers()[2]


def connect_ray(address: str, most: int | None = None) -> RayCluster:
    """Join the Ray cluster at `address`: `auto` (the one of this machine), `local` (a new one), or host:port.

    ValueError where Ray is not installed or no cluster answers.
    """
    try:
        import ray
    except ImportError:
        raise ValueError(
            f"--ray: got {address}, but ray is not installed; `pip install 'lwm[ray]'` on every machine, or leave "
            "--ray out to work in processes of this machine"
        ) from None
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
        # The workers run this very code, whatever version their machines have installed.
        environment = {"py_modules": [str(Path(__file__).parent)], "excludes": ["__pycache__"]}
        try:
            if address not in ("auto", "local"):
                host, _, port = address.rpartition(":")  # Ray itself would knock for minutes
                socket.create_connection((host, int(port)), timeout=PATIENCE).close()
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=environment)
        except (OSError, RuntimeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"--ray: got {address}: no cluster answers ({str(error).splitlines()[0]}); wanted auto, local or "
                "host:port; `ray start --head` starts a cluster, and the build must run on one of its machines"
            ) from error
    return RayCluster(address, most)


def run_on_ray(
    function: Callable[[Any, Any], Any], shared: Any, units: Iterable[Any], cluster: RayCluster, model: bool
) -> Iterator[Any]:
    """`function(shared, unit)` of each unit, in the units' order; as `engine.run_units`, which see."""
    pool = _Actors(function, shared, cluster) if model else _Tasks(function, shared, cluster)
    todo = enumerate(units)
    again: deque[tuple[int, Any]] = deque()  # units that were lost with their worker
    lost: Counter[int] = Counter()
    busy: dict[Any, tuple[int, Any]] = {}
    done: dict[int, Any] = {}
    turn = 0
    exhausted = False
    try:
        while True:
            while pool.room(len(busy)) and (again or (not exhausted and len(busy) + len(done) < AHEAD * pool.size)):
                taken = again.popleft() if again else next(todo, None)
                if taken is None:
                    exhausted = True
                    break
                busy[pool.submit(taken[1])] = taken
            while turn in done:
                yield done.pop(turn)
                turn += 1
            if exhausted and not busy and not again:
                return
            for ready in pool.wait(list(busy)):
                number, unit = busy.pop(ready)
                reply = pool.receive(ready)
                if isinstance(reply, Exception):
                    lost[number] += 1
                    if lost[number] > (RETRIES if model else 0):
                        raise OSError(
                            f"a unit was lost with its worker {RETRIES + 1} times, which often means out of memory "
                            f"({str(reply).splitlines()[0]}); run again with fewer --workers, finished work is kept"
                        )
                    again.append((number, unit))
                    continue
                error, result = reply
                if error is not None:
                    raise error
                done[number] = result
    finally:
        pool.stop(list(busy))


class _Tasks:
    """A task for each unit; Ray itself runs those again that are lost, before it gives up."""

    def __init__(self, function: Callable[[Any, Any], Any], shared: Any, cluster: RayCluster) -> None:
        self._ray = ray = _ray()
        self._function = ray.put(function)
        self._shared = ray.put(shared)
        self._remote = ray.remote(num_cpus=1, max_retries=RETRIES, scheduling_strategy="SPREAD")(_run)
        num_cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self.size = cluster.most or num_cpus
        self._most = cluster.most or QUEUED * num_cpus

    def room(self, num_busy: int) -> bool:
        return num_busy < self._most

    def submit(self, unit: Any) -> Any:
        return self._remote.remote([self._function, self._shared], unit)

    def wait(self, busy: list[Any]) -> list[Any]:
        return list(self._ray.wait(busy, num_returns=1)[0])

    def receive(self, ready: Any) -> Any:
        """(error, result) of a unit, or why it is lost."""
        return _receive(self._ray, ready)

    def stop(self, busy: list[Any]) -> None:
        """End what is under way: first as Ctrl-C would, so that temporaries are removed."""
        for task in busy:
            self._ray.cancel(task)
        if busy:
            _, left = self._ray.wait(busy, num_returns=len(busy), timeout=PATIENCE)
            for task in left:
                self._ray.cancel(task, force=True)


class _Actors:
    """An actor for each model that finds room. One that dies is replaced, and may wait for room without harm."""

    def __init__(self, function: Callable[[Any, Any], Any], shared: Any, cluster: RayCluster) -> None:
        self._ray = ray = _ray()
        num, num_gpus, num_cpus = _model_workers()
        self.size = min(num, cluster.most or num)
        self._arguments = (function, ray.put(shared))
        self._kind = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=0, scheduling_strategy="SPREAD")(
            _Actor
        )
        self._starting: dict[Any, Any] = {}  # the promise that it stands -> actor
        self._idle: list[Any] = []
        self._busy: dict[Any, Any] = {}
        self._failed = 0  # to start, since one did
        for _ in range(self.size):
            self._start()

    def _start(self) -> None:
        actor = self._kind.remote(*self._arguments)
        self._starting[actor.ready.remote()] = actor

    def room(self, num_busy: int) -> bool:
        return bool(self._idle)

    def submit(self, unit: Any) -> Any:
        actor = self._idle.pop(0)
        task = actor.run.remote(unit)
        self._busy[task] = actor
        return task

    def wait(self, busy: list[Any]) -> list[Any]:
        ready, _ = self._ray.wait([*busy, *self._starting], num_returns=1)
        for promise in [one for one in ready if one in self._starting]:
            actor = self._starting.pop(promise)
            error = _receive(self._ray, promise)
            if error is None:
                self._idle.append(actor)
                self._failed = 0
            elif self._failed == RETRIES:
                raise OSError(f"no worker with a model can start: {error}")
            else:
                self._failed += 1
                self._start()
        return [one for one in ready if one in self._busy]

    def receive(self, ready: Any) -> Any:
        actor = self._busy.pop(ready)
        reply = _receive(self._ray, ready)
        if isinstance(reply, Exception):
            self._start()
        else:
            self._idle.append(actor)
        return reply

    def stop(self, busy: list[Any]) -> None:
        for actor in [*self._idle, *self._busy.values(), *self._starting.values()]:
            self._ray.kill(actor)


class _Actor:
    def __init__(self, function: Callable[[Any, Any], Any], shared: Any) -> None:
        self._function, self._shared = function, shared

    def ready(self) -> None:
        """It stands."""

    def run(self, unit: Any) -> tuple[Exception | None, Any]:
        return _call(self._function, self._shared, unit)


def _run(arguments: list[Any], unit: Any) -> tuple[Exception | None, Any]:
    function, shared = (_kept(reference) for reference in arguments)
    return _call(function, shared, unit)


@lru_cache(maxsize=4)
def _kept(reference: Any) -> Any:
    """What stands behind a reference; unpacked once in each worker, not once for each unit."""
    return _ray().get(reference)


def _call(function: Callable[[Any, Any], Any], shared: Any, unit: Any) -> tuple[Exception | None, Any]:
    try:
        return None, function(shared, unit)
    except Exception as error:  # as a value: the caller gets it as it is
        error.__traceback__ = None
        return error, None


def _ray() -> Any:
    """The library, once `connect_ray` has said that it is there; it takes a second to import."""
    import ray

    return ray


def _receive(ray: Any, ready: Any) -> Any:
    """The reply, or, as a value, the error that says that it will not come."""
    try:
        return ray.get(ready)
    except ray.exceptions.RayTaskError as error:  # of ours, or a module that the machine lacks
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except ray.exceptions.RayError as error:
        return error


def _model_workers() -> tuple[int, int, int]:
    """How many workers with a model the cluster has room for, and the GPUs and CPUs of each."""
    ray = _ray()
    machines = [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]
    num_gpus = sum(int(machine.get("GPU", 0)) for machine in machines)
    if num_gpus:
        cores = min(int(machine.get("CPU", 0)) // int(machine["GPU"]) for machine in machines if machine.get("GPU"))
        return num_gpus, 1, max(1, cores)
    cores = min(MODEL_CORES, *(max(1, int(machine.get("CPU", 0))) for machine in machines))
    return max(1, sum(int(machine.get("CPU", 0)) // cores for machine in machines)), 0, cores
