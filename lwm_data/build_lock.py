"""Holds a folder for one build.

    on a disk      .work/lock      flock: gone with the process, however it ends
                   .work/writers   shared by all who write a shard: a worker outlives a killed build for a moment
    behind a URL   .work/lock      an object that its build writes anew every BEAT seconds

A URL knows no locks that go with their process. So whoever finds the object watches it: if it changes, its build is at
work, and the newcomer is refused; if it stays the same for PATIENCE seconds (or its process was on this machine and is
gone), its build is dead, and the newcomer takes its place. No clocks are compared.

A build that slept may find its place taken. So it looks at the object before it uploads or removes anything, workers do
so, too, by the key that they are given, and what is not its own any more is left alone. What is left is the moment
between look and act: an upload that was under way when the build fell asleep may still end.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from lwm_data.folder import UrlFolder

LOCK = "lock"
BEAT = 10.0  # seconds
PATIENCE = 60.0
LOOK_AGAIN = 1.0  # after which a beat is whole, where a store shows it half-written
SETTLE = 2.0  # seconds after which only the last of several who take a dead build's place is left


class DiskLock:
    """Of the folder `work`. ValueError from `acquire` where another build has it."""

    key = ""

    def __init__(self, work: Path) -> None:
        self._work = work

    def acquire(self) -> None:
        """Make the folder and hold it; waits for workers of a killed build, which end by themselves."""
        while True:
            self._work.mkdir(parents=True, exist_ok=True)
            try:
                self._lock = os.open(self._work / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # the build before us has just removed .work
                continue
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(self._lock).st_ino == os.stat(self._work / LOCK).st_ino:
                    break
            except BlockingIOError:
                os.close(self._lock)
                raise ValueError(
                    f"out: got {self._work.parent}: another build is writing there; wait for it or stop it"
                ) from None
            except FileNotFoundError:
                pass
            os.close(self._lock)
        with open(self._work / "writers", "ab") as writers:
            fcntl.flock(writers, fcntl.LOCK_EX)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """While the block lasts, no other build begins here, even if this one is killed."""
        with open(self._work / "writers", "ab") as writers:
            fcntl.flock(writers, fcntl.LOCK_SH)
            yield

    def check(self) -> None:
        """The kernel keeps the lock."""

    def release(self, clear: bool) -> None:
        """Give the folder free. clear: remove all that is in it before."""
        if clear:
            shutil.rmtree(self._work)
        os.close(self._lock)


class UrlLock:
    """Of the folder `work` behind a URL; methods as those of DiskLock.

    key: of the build that holds it, for its workers, which only look (`check`).
    """

    def __init__(self, work: UrlFolder, key: str = "") -> None:
        self._work = work
        self.key = key or uuid4().hex
        self._owner = {"id": self.key, "host": _host(), "process": os.getpid()}
        self._stop = threading.Event()

    def acquire(self) -> None:
        while not self._work.create(LOCK, self._content(0)) and not self._is_ours():
            if self._is_dead():
                self._work.write(LOCK, self._content(0))
                time.sleep(SETTLE)
                if not self._is_ours():
                    raise self._refusal(self._read() or {})
                break
        self._heart = threading.Thread(target=self._beat, name="lock of out", daemon=True)
        self._heart.start()

    def writing(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # workers end with their build, or find by `check` that it is over

    def check(self) -> None:
        """ValueError where another build has taken this one for dead."""
        if self._is_ours():
            return
        time.sleep(LOOK_AGAIN)
        if not self._is_ours():
            raise ValueError(
                f"{self._work}: another build took over, as this one was not heard of for {PATIENCE:.0f} s (asleep, or "
                "cut off); run it again when that one has ended, or give it an `out` of its own"
            )

    def release(self, clear: bool) -> None:
        """Give the folder free, if it is still ours."""
        if clear:
            with contextlib.suppress(ValueError):  # another build took over: these are its own
                self._work.remove(self._work.sizes().keys() - {LOCK}, self.check)
        self._stop.set()
        self._heart.join()
        if self._is_ours():
            self._work.remove([LOCK])

    def _content(self, beat: int) -> bytes:
        return json.dumps(self._owner | {"beat": beat}).encode()

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self._work.read(LOCK))
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _is_ours(self) -> bool:
        return (self._read() or {}).get("id") == self._owner["id"]

    def _is_dead(self) -> bool:
        """Whether the build that the lock names is gone; False where the lock is. ValueError where the build lives."""
        first = self._read()
        for _ in range(round(PATIENCE / BEAT) * 4):
            if first is None:
                return False
            if first.get("host") == _host() and _is_gone(first.get("process")):
                return True
            time.sleep(BEAT / 4)
            now = self._read()
            if now is None:
                return False
            if now != first:
                raise self._refusal(now)
        return True

    def _refusal(self, owner: dict[str, Any]) -> ValueError:
        host, process = str(owner.get("host", "?")).partition(" ")[0][:100], str(owner.get("process", "?"))[:20]
        return ValueError(
            f"out: got {str(self._work).rpartition('/')[0]}: another build is writing there (process {process} on "
            f"{host}); wait for it or stop it"
        )

    def _beat(self) -> None:
        beat = 0
        while not self._stop.wait(BEAT):
            try:
                if not self._is_ours():
                    return
                beat += 1
                self._work.write(LOCK, self._content(beat))
            except Exception:  # told by the build's own requests, and the next beat may succeed
                continue


def _is_gone(process: object) -> bool:
    """Whether no process of this machine has that number; /proc may hide those of others."""
    if not isinstance(process, int) or process <= 0:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _host() -> str:
    """This machine and its space of process numbers: two containers may have one name."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return f"{socket.gethostname()} {uuid4().hex}"  # not Linux: nobody is known to be gone
