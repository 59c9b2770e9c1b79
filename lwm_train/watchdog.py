"""Ends a process whose steps have stopped: a supervisor can start it again, but not see that it hangs.

    beat  beat  beat  ..... seconds without one .....  stacks of all threads to RUN/stacks-*.txt and stderr, exit 1

The first beat may take FIRST times as long, as the step before it is compiled. A thread of Python cannot bark while
foreign code holds the interpreter; then `faulthandler`, which needs no interpreter, ends the process a little later.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

FIRST = 6  # the first beat's limit, in those of others
LATER = 60.0  # seconds that the thread has for its own bark


class Watchdog:
    """Within the block, ends the process when `beat` is not called for `seconds`; 0: never."""

    def __init__(self, run: Path, seconds: float) -> None:
        self._run, self._seconds = run, seconds
        self._left = threading.Event()

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._wait_for(self._seconds * FIRST)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Something was finished."""
        if self._seconds:
            self._wait_for(self._seconds)

    def _wait_for(self, seconds: float) -> None:
        self._limit, self._deadline = seconds, time.monotonic() + seconds
        faulthandler.dump_traceback_later(seconds + LATER, exit=True, file=sys.__stderr__ or 2)

    def _watch(self) -> None:
        while not self._left.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() > self._deadline:
                self._bark()

    def _bark(self) -> None:
        path = self._run / f"stacks-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
        try:
            with open(path, "w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            told = f"; all stacks are in {path}"
        except OSError:  # the disk may be what hangs or is full
            told = ""
        stderr = sys.__stderr__ or 2
        faulthandler.dump_traceback(stderr, all_threads=True)
        message = f"error: no step ended for {self._limit:g} s (watchdog){told}; run it again to go on from the newest "
        os.write(2, f"{message}checkpoint\n".encode())
        os._exit(1)
