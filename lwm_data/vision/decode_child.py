"""One process that decodes what strangers made: it may crash, hang or run out of memory, and nobody else does.

    asked      an ImageRequest or a VideoRequest, pickled                              (we trust our parent)
    answers    {"frames": n, "last": false} + n frames' bytes, ... {"frames": n, "last": true} + bytes
               or {"failure": [reason, detail]}                                        (JSON: it trusts not us)

The time limit is a timer of the kernel that ends the process, wherever it is. It counts the processor's time, so that
a busy machine refuses no file that an idle one takes; a second one, far longer, counts real time, for what hangs. That
one stands still while an answer waits to be taken.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from jaxtyping import UInt8

from lwm_data.vision.frames import FRAME, Decoder, decode_image, decode_video

CHUNK = 64  # frames in one answer: 12.6 MB
MAX_DETAIL = 2000  # characters
TIMERS = (signal.SIGPROF, signal.SIGALRM)  # that end the process: of the processor's time, of real time


@dataclass(frozen=True)
class ImageRequest:
    """data: the file's bytes. min_size: as in frames.decode_image."""

    data: bytes
    min_size: int = 0


@dataclass(frozen=True)
class VideoRequest:
    """source: the file's bytes, or its local path. The rest as in frames.decode_video."""

    source: bytes | str
    fps: float
    max_frames: int | None = None
    start: float | None = None
    end: float | None = None
    decoder: Decoder = "pyav"
    min_size: int = 0


def serve(channel: int, lifeline: int, seconds_per_item: float, hung_after: float, max_memory: int) -> None:
    """Answer requests from the descriptor `channel` until it closes; end at once when `lifeline` closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    for number in TIMERS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TIMERS)
    threading.Thread(target=_die_with_parent, args=(lifeline,), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (max_memory, max_memory))
    client = _Client(Connection(channel), seconds_per_item, hung_after)
    client.send({"ready": True})
    # Decoders write what they think of a file to the terminal.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    while True:
        try:
            request = client.receive()
            if request is None:
                return
            client.answer(request)
        except MemoryError:
            client.send({"failure": ["out of memory", f"needs more than {max_memory:,} bytes"]})
            return  # what is left of the memory is not enough to go on with
        except BrokenPipeError:
            return
        except ImportError:
            client.send({"error": traceback.format_exc()})
        except ValueError as error:
            reason, detail = error.args if len(error.args) == 2 else ("damaged", str(error))
            client.send({"failure": [str(reason), str(detail)[:MAX_DETAIL]]})
        except Exception as error:  # decoders raise what they like, and no file may end a build
            client.send({"failure": ["decoder crashed", f"{type(error).__name__}: {error}"[:MAX_DETAIL]]})


class _Client:
    """The parent, as seen from here. Time is counted from a request to its last answer, but not while sending."""

    def __init__(self, connection: Connection, seconds: float, hung_after: float) -> None:
        self._connection = connection
        self._seconds = seconds
        self._hung_after = hung_after
        self._frames = np.empty((CHUNK, FRAME, FRAME, 3), np.uint8)

    def receive(self) -> Any:
        try:
            request = self._connection.recv()
        except (EOFError, OSError):
            return None
        signal.setitimer(signal.ITIMER_PROF, self._seconds)
        signal.setitimer(signal.ITIMER_REAL, self._hung_after)
        return request

    def send(self, header: dict[str, Any], frames: UInt8[np.ndarray, "n 256 256 3"] | None = None) -> None:
        left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
        self._connection.send_bytes(json.dumps(header).encode())
        if frames is not None:
            self._connection.send_bytes(frames.data.cast("B"))
        if header.get("last", True):
            signal.setitimer(signal.ITIMER_PROF, 0)
        else:
            signal.setitimer(signal.ITIMER_REAL, left)

    def answer(self, request: ImageRequest | VideoRequest) -> None:
        count = 0
        for frame in _decode(request):
            if count == CHUNK:
                self.send({"frames": count, "last": False}, self._frames)
                count = 0
            self._frames[count] = frame
            count += 1
        self.send({"frames": count, "last": True}, self._frames[:count])


def _decode(request: ImageRequest | VideoRequest) -> Iterator[UInt8[np.ndarray, "256 256 3"]]:
    if isinstance(request, ImageRequest):
        yield decode_image(request.data, request.min_size)
    else:
        yield from decode_video(
            request.source,
            fps=request.fps,
            max_frames=request.max_frames,
            start=request.start,
            end=request.end,
            decoder=request.decoder,
            min_size=request.min_size,
        )


def _die_with_parent(lifeline: int) -> None:
    """The parent holds the other end, and never writes."""
    with contextlib.suppress(OSError):
        os.read(lifeline, 1)
    os._exit(1)
