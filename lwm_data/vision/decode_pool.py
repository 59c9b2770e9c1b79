"""Decoding in processes of its own: a hostile file can neither crash nor hang a build, and cores decode side by side.

    requests   r0  r1  r2 ...                       taken a few ahead, by a thread of ours
    processes  [r0] [r1]                            one request at a time; ended at the time or memory limit, replaced;
                                                    one that somebody killed is replaced and asked again, once
    results    r0: Chunk Chunk Chunk(last)  r1: Chunk Failure  r2: Chunk(last) ...
                                                    in the requests' order, whoever was faster

Memory is bounded: a video comes in chunks, and a process that is ahead waits. Pixels come back through a socket, at
0.2 ms a frame of the 5 that decoding takes. Shared memory takes 0.06, but outlives a kill, and containers have little.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import BufferTooShort
from multiprocessing.connection import Connection, wait

import numpy as np
from jaxtyping import UInt8

from lwm_data.vision.decode_child import CHUNK as CHUNK
from lwm_data.vision.decode_child import ImageRequest as ImageRequest
from lwm_data.vision.decode_child import VideoRequest as VideoRequest
from lwm_data.vision.square import FRAME

ITEMS_AHEAD = 16  # requests per process whose results may be there before their turn
READY_FRAMES = 4 * CHUNK  # whose turn it is, waiting for the caller
MAX_HEADER = 1 << 16  # bytes
KILLED = (
    "a decoder process was killed, twice at the same file (exit code -9, which often means out of memory); run again "
    "with fewer --workers, finished work is kept"
)


@dataclass(frozen=True)
class Chunk:
    """Up to CHUNK frames of request number `item` (0, 1, ...). last: no more of this item will come."""

    item: int
    frames: UInt8[np.ndarray, "n 256 256 3"]
    last: bool


@dataclass(frozen=True)
class Failure:
    """Request number `item` has no (more) frames; chunks of it that came before are to be thrown away.

    reason: one of few: those of frames.py, "timed out", "out of memory", "decoder crashed".
    """

    item: int
    reason: str
    detail: str


class DecodePool:
    """with DecodePool(2) as pool: for result in pool.decode(requests): ...

    seconds_per_item: of a processor's work on one image or video. hung_after: seconds of any kind; by default ten times
    as many. max_memory: address space of a process, bytes. frames_ahead: that may wait for their turn, of 196,608 bytes
    each; several long videos are decoded side by side only as far as that.
    """

    def __init__(
        self,
        num_processes: int,
        *,
        seconds_per_item: float = 300.0,
        hung_after: float | None = None,
        max_memory: int = 4 << 30,
        frames_ahead: int = 1024,
    ) -> None:
        self._num_processes = num_processes
        self._limits = seconds_per_item, hung_after or 10 * seconds_per_item, max_memory
        self._frames_ahead = frames_ahead
        self._children: list[_Child] = []
        self._running = threading.Lock()  # decode
        self._stopped = threading.Event()

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for child in self._children:
            child.end()

    def decode(self, requests: Iterable[ImageRequest | VideoRequest]) -> Iterator[Chunk | Failure]:
        """In the requests' order; each is zero or more chunks, then one with `last`, or a Failure.

        `requests` is drawn from another thread. Its errors come out here. One call at a time. OSError where processes
        are killed from outside, as by a system that runs out of memory: that tells nothing of the file.
        """
        if not self._running.acquire(blocking=False):
            raise RuntimeError("a DecodePool decodes one list of requests at a time")
        self._stopped.clear()
        results: queue.SimpleQueue[Chunk | Failure | BaseException | None] = queue.SimpleQueue()
        room = threading.Semaphore(READY_FRAMES)
        thread = threading.Thread(target=self._feed, args=(requests, results, room), daemon=True)
        thread.start()
        try:
            while (result := results.get()) is not None:
                if isinstance(result, BaseException):
                    raise result
                room.release(_num_frames(result))
                yield result
        finally:
            self._stopped.set()
            room.release(READY_FRAMES)
            while thread.is_alive():  # the caller has had enough
                for child in self._children:
                    if child.item is not None:
                        child.kill()  # wakes the thread
                thread.join(0.1)
            for child in self._children:
                if child.item is not None:
                    child.end()
            self._running.release()

    def _feed(
        self,
        requests: Iterable[ImageRequest | VideoRequest],
        results: queue.SimpleQueue[Chunk | Failure | BaseException | None],
        room: threading.Semaphore,
    ) -> None:
        try:
            for result in self._in_order(requests):
                for _ in range(_num_frames(result)):
                    room.acquire()
                if self._stopped.is_set():
                    return
                results.put(result)
            results.put(None)
        except BaseException as error:  # raised again where decode's caller sees it
            results.put(error)

    def _in_order(self, requests: Iterable[ImageRequest | VideoRequest]) -> Iterator[Chunk | Failure]:
        todo = enumerate(requests)
        items: deque[_Item] = deque()  # asked for, not all given out
        while True:
            while len(items) < ITEMS_AHEAD * self._num_processes and (child := self._idle_child()):
                number, request = next(todo, (0, None))
                if request is None:
                    break
                items.append(_Item(number, request, self._asked(child, number, request)))
            if not items:
                return
            if items[0].results:
                result = items[0].results.popleft()
                if items[0].finished and not items[0].results:
                    items.popleft()
                yield result
                continue
            waiting = sum(_num_frames(result) for item in items for result in item.results)
            for item in self._readable(items, waiting + CHUNK > self._frames_ahead):
                if self._stopped.is_set():
                    return
                try:
                    item.add(item.child.receive())
                except _Killed:
                    if self._stopped.is_set():  # it was us
                        return
                    if item.is_second:
                        raise OSError(KILLED) from None
                    assert item.request is not None, "it was at work on it"
                    item.ask_again(self._asked(self._new_child(), item.number, item.request))

    def _asked(self, child: _Child, number: int, request: ImageRequest | VideoRequest) -> _Child:
        """The process that now works on the request: `child`, or another one where that died while it was idle."""
        while not child.ask(number, request):
            child = self._new_child()
        return child

    def _readable(self, items: deque[_Item], is_full: bool) -> list[_Item]:
        """Items that can go on; waits until there is one. Where memory is full, only the one whose turn it is."""
        channels = {item.child.channel: item for item in list(items)[: 1 if is_full else None] if not item.finished}
        return [channels[ready] for ready in wait(list(channels))]  # type: ignore[index] # they are Connections

    def _idle_child(self) -> _Child | None:
        self._children = [child for child in self._children if not child.ended]
        for child in self._children:
            if child.item is None:
                return child
        return self._new_child() if len(self._children) < self._num_processes else None

    def _new_child(self) -> _Child:
        self._children.append(_Child(*self._limits))
        return self._children[-1]


class _Killed(Exception):
    """A process was killed; of what it was at work on, that tells nothing."""


@dataclass
class _Item:
    """Request number `number` while its results are awaited. request: None once all have come."""

    number: int
    request: ImageRequest | VideoRequest | None
    child: _Child
    results: deque[Chunk | Failure] = field(default_factory=deque)
    num_chunks: int = 0  # that came
    num_again: int = 0  # that came, and will come again, from a second process
    is_second: bool = False

    @property
    def finished(self) -> bool:
        return self.request is None

    def ask_again(self, child: _Child) -> None:
        self.child, self.num_again, self.is_second = child, self.num_chunks, True

    def add(self, result: Chunk | Failure | None) -> None:
        if isinstance(result, Chunk) and self.num_again:
            self.num_again -= 1
        elif result is not None:
            self.results.append(result)
            self.num_chunks += 1
            if isinstance(result, Failure) or result.last:
                self.request = None


def _num_frames(result: Chunk | Failure) -> int:
    return len(result.frames) if isinstance(result, Chunk) else 1


class _Child:
    """A process that runs decode_child.serve, by subprocess: a worker of multiprocessing may have no children."""

    def __init__(self, seconds_per_item: float, hung_after: float, max_memory: int) -> None:
        ours, theirs = socket.socketpair()
        watched, self._lifeline = os.pipe()
        arguments = theirs.fileno(), watched, seconds_per_item, hung_after, max_memory
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from lwm_data.vision.decode_child import serve; serve{arguments}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), watched),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"},
            process_group=0,  # Ctrl-C is for the parent
        )
        theirs.close()
        os.close(watched)
        self.channel = Connection(ours.detach())
        self.item: int | None = None  # that it works on
        self.ended = False
        self._timed_out = {
            -signal.SIGPROF: f"takes more than {seconds_per_item:g} s of a processor",
            -signal.SIGALRM: f"hangs: not decoded within {hung_after:g} s",
        }
        self._ready = False

    def ask(self, item: int, request: ImageRequest | VideoRequest) -> bool:
        """Whether it was there to be asked."""
        try:
            self.channel.send(request)
        except OSError:
            if self._ready:
                self.end()
                return False
            # It could not start, or has not the memory to read the request: `receive` tells.
        self.item = item
        return True

    def receive(self) -> Chunk | Failure | None:
        """Its next answer, None if it only says that it is there. Waits; a child that died gives a Failure.

        _Killed where it did not die of itself.
        """
        assert self.item is not None
        item = self.item
        try:
            header = json.loads(self.channel.recv_bytes(MAX_HEADER))
            if "ready" in header:
                self._ready = True
                return None
            if "error" in header:
                raise RuntimeError(f"a decoder process failed:\n{header['error']}")
            if "failure" in header:
                reason, detail = header["failure"]
                self.item = None
                if reason == "out of memory":
                    self.end()
                # JSON can spell half of a surrogate pair, and what is kept is UTF-8.
                return Failure(item, str(reason), str(detail).encode("utf-8", "backslashreplace").decode())
            frames = np.empty((min(int(header["frames"]), CHUNK), FRAME, FRAME, 3), np.uint8)
            self.channel.recv_bytes_into(frames.data.cast("B"))
            if header["last"]:
                self.item = None
            return Chunk(item, frames, bool(header["last"]))
        except (EOFError, OSError):
            return self._died()
        except (ValueError, TypeError, KeyError, BufferTooShort):  # its memory is no longer what we made it
            self.end()
            return Failure(item, "decoder crashed", "it answers what cannot be read")

    def _died(self) -> Failure:
        assert self.item is not None
        code = self._process.wait()
        self.end()
        if code == -signal.SIGKILL:
            raise _Killed
        if not self._ready:
            raise RuntimeError(f"a decoder process did not start (exit code {code}); its message is above")
        if code in self._timed_out:
            return Failure(self.item, "timed out", self._timed_out[code])
        return Failure(self.item, "decoder crashed", f"exit code {code}")

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        if not self.ended:
            self.ended = True
            self.kill()
            self._process.wait()
            self.channel.close()
            os.close(self._lifeline)
