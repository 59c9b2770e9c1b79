"""What was answered, kept for good: an append-only file, a JSON object a line, synced before it counts.

journal.jsonl   {"key": "5f0e...", "kind": "answer", "raw": "...", "time": ..., ...}
                {"key": "91bc...", "kind": "failed", "reason": "timeout", ...}
                {"key": "77a0...", "kind": "judge", "raw": "yes", ...}
                {"key": "e2                     torn by a kill: cut off, and asked again

Of two lines of one key the later one holds. In memory stands where each line begins, about 200 bytes a key. Lines
that come while others are being synced wait, and go together with the next sync.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from lwm_data.whole_file import sync_folder

JOURNAL = "journal.jsonl"
MAX_LINE = 64 << 20  # bytes
MAX_WAITING = 1024  # lines
NEEDED = {
    "answer": {"raw", "time", "finish_reason", "usage"},
    "judge": {"raw"},
    "failed": {"raw", "reason", "detail"},
}  # by kind
USAGE = ("prompt_tokens", "completion_tokens")


class Journal:
    """The journal at `path`, made where there is none. ValueError where it holds a line that no run wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[bytes, int] = {}  # key -> where its line begins
        self._failed: set[bytes] = set()
        self._waiting: list[bytes] = []
        self._unsynced: dict[int, dict[str, Any]] = {}
        self._flush: asyncio.Task[None] | None = None
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        sync_folder(path.parent)
        self._size = self._synced = self._read()
        os.ftruncate(self._file, self._size)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._places

    def has_failed(self, key: str) -> bool:
        """Whether the key's line tells of a failure."""
        return bytes.fromhex(key) in self._failed

    def get(self, key: str) -> dict[str, Any] | None:
        """The entry of `key`; None where there is none."""
        place = self._places.get(bytes.fromhex(key))
        if place is None:
            return None
        if place >= self._synced:
            return self._unsynced[place]
        with open(self.path, "rb") as file:
            file.seek(place)
            found = json.loads(file.readline())
        assert isinstance(found, dict)
        return found

    async def add(self, entry: dict[str, Any]) -> None:
        """Write `entry`, which has a `key` and a `kind`; returns before it is synced, unless many wait for that."""
        line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        self._note(entry, self._size)
        self._unsynced[self._size] = entry
        self._size += len(line)
        self._waiting.append(line)
        if self._flush is None or self._flush.done():
            await self._settled()
            self._flush = asyncio.create_task(self._write())
        elif len(self._waiting) >= MAX_WAITING:
            await self._settled()

    async def close(self) -> None:
        """Sync what waits; `get` works on. OSError where the disk is full."""
        await self._settled()
        if self._waiting:
            await self._write()
        os.close(self._file)

    async def _settled(self) -> None:
        if self._flush is not None:
            await asyncio.shield(self._flush)

    async def _write(self) -> None:
        while self._waiting:
            lines, self._waiting = b"".join(self._waiting), []
            await asyncio.get_running_loop().run_in_executor(None, self._append, lines)
            self._synced += len(lines)
            self._unsynced = {place: entry for place, entry in self._unsynced.items() if place >= self._synced}

    def _append(self, lines: bytes) -> None:
        left = memoryview(lines)
        while left:
            left = left[os.pwrite(self._file, left, self._synced + len(lines) - len(left)) :]
        os.fsync(self._file)

    def _read(self) -> int:
        """Note the lines that are there; where the last whole one ends."""
        place = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
                if not line.endswith(b"\n") and len(line) <= MAX_LINE:
                    break
                try:
                    entry = json.loads(line)
                    if missing := NEEDED[entry["kind"]] - entry.keys():
                        raise ValueError(f"no {min(missing)}")
                    if entry["kind"] == "answer" and not all(0 <= entry["usage"][name] < 1 << 62 for name in USAGE):
                        raise ValueError("usage")
                    self._note(entry, place)
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise ValueError(
                        f"{self.path}:{number}: not a line of a journal ({error}); remove this line, its chunk is "
                        "asked again, or name another `out`"
                    ) from None
                place += len(line)
        return place

    def _note(self, entry: dict[str, Any], place: int) -> None:
        key = bytes.fromhex(entry["key"])
        self._places[key] = place
        (self._failed.add if entry["kind"] == "failed" else self._failed.discard)(key)
