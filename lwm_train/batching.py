"""One thread owns the model; whoever asks waits for it. Prompts of one bucket of lengths are answered together.

    submit -> [a:40] [b:40] [c:96] [d:40] ...      at most `max_waiting`; beyond that QueueFull
                 |      |             |
                 +------+-------------+--> generate --> each ticket's updates, every 16 tokens, then the last one
                                                        a ticket whose tokens are all there waits for no other

The bucket of the oldest is next. A batch that runs is not joined: who comes meanwhile is in one of the next.
"""

from __future__ import annotations

import math
import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax

from lwm_train.config import ModelConfig
from lwm_train.generate import Draw, bucket, generate_drawn
from lwm_train.model import Params

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
TOLD_COMPILE = 0.2  # seconds of compiling that are worth a line


class QueueFull(Exception):
    """Too many wait; `seconds` is about how long the next batch takes."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"too many requests wait; try again in {seconds} s")
        self.seconds = seconds


class Stopping(Exception):
    """The model answers no more."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class GenerationFailed(Exception):
    """The batch ended with an error, which the log tells."""


@dataclass(frozen=True)
class Update:
    """The tokens so far; `finished` where these are all."""

    ids: list[int]
    finished: bool


@dataclass(eq=False)
class Ticket:
    """What one who asked waits for. `updates` ends with a finished Update or an exception; set `cancelled` to leave."""

    prompt: Sequence[int]
    draw: Draw
    updates: queue.SimpleQueue[Update | Exception] = field(default_factory=queue.SimpleQueue)
    cancelled: bool = False
    settled: bool = False

    def settle(self, last: Update | Exception) -> None:
        """Give the last update, unless there was one."""
        if not self.settled:
            self.settled = True
            self.updates.put(last)


class Batcher:
    """The thread that generates, and the queue before it."""

    def __init__(self, params: Params, config: ModelConfig, eos: int, max_batch: int, max_waiting: int) -> None:
        self._params, self._config, self._eos = params, config, eos
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._cut_at = math.inf  # time.monotonic() from which what runs is cut off
        self._batch_seconds = 1.0
        self._compile_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)
        jax.monitoring.register_event_duration_secs_listener(self._count_compiling)
        self._thread.start()

    def submit(self, prompt: Sequence[int], draw: Draw) -> Ticket:
        """A ticket for the tokens after `prompt`. QueueFull or Stopping where there is none."""
        ticket = Ticket(prompt, draw)
        with self._changed:
            if self._stopping:
                raise Stopping
            if len(self._waiting) >= self._max_waiting:
                raise QueueFull(math.ceil(self._batch_seconds))
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def num_waiting(self) -> int:
        with self._changed:
            return len(self._waiting)

    def close(self, grace: float, limit: float) -> bool:
        """Answer nobody who waits; cut off what runs after `grace` seconds; whether the thread ended within `limit`."""
        with self._changed:
            self._stopping = True
            self._cut_at = time.monotonic() + grace
            for ticket in self._waiting:
                ticket.settle(Stopping())
            self._waiting.clear()
            self._changed.notify()
        self._thread.join(limit)
        jax.monitoring.unregister_event_duration_listener(self._count_compiling)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while batch := self._next_batch():
            begin, self._compile_seconds = time.monotonic(), 0.0
            try:
                self._answer(batch)
            except Exception as error:  # of whatever kind: the next batch has other prompts
                where = traceback.extract_tb(error.__traceback__)[-1]
                print(f"generate: {type(error).__name__} in {where.name}", file=sys.stderr, flush=True)
                for ticket in batch:
                    ticket.settle(GenerationFailed(f"the model failed ({type(error).__name__})"))
            self._batch_seconds = max(1.0, time.monotonic() - begin - self._compile_seconds)
            if self._compile_seconds > TOLD_COMPILE:
                print(
                    f"generate: {self._compile_seconds:.1f} s were compiling, for a new shape ({len(batch)} prompts of "
                    f"{bucket(len(batch[0].prompt)):,} tokens)",
                    file=sys.stderr,
                    flush=True,
                )

    def _next_batch(self) -> list[Ticket]:
        """The oldest ticket and those of its bucket; empty when the thread shall end."""
        with self._changed:
            while True:
                self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled)
                if self._waiting or self._stopping:
                    break
                self._changed.wait()
            batch: list[Ticket] = []
            others: deque[Ticket] = deque()
            for ticket in self._waiting:
                fits = not batch or bucket(len(ticket.prompt)) == bucket(len(batch[0].prompt))
                (batch if fits and len(batch) < self._max_batch else others).append(ticket)
            self._waiting = others
            return batch

    def _answer(self, batch: list[Ticket]) -> None:
        def watch(number: int, ids: list[int], finished: bool) -> bool:
            ticket = batch[number]
            if finished:
                ticket.settle(Update(ids, True))
            elif time.monotonic() > self._cut_at:
                ticket.settle(Stopping())
            elif not ticket.cancelled:
                ticket.updates.put(Update(ids, False))
            return not (ticket.settled or ticket.cancelled)

        prompts, draws = [ticket.prompt for ticket in batch], [ticket.draw for ticket in batch]
        generate_drawn(self._params, self._config, prompts, draws, eos=self._eos, watch=watch)

    def _count_compiling(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILE_EVENT:
            self._compile_seconds += duration_secs
