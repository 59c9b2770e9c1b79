"""A server of chat/completions in a thread: it answers from the chunk alone, and does wrong where it is told to.

    server.faults = lambda number, asked: "429" | "500" | ... | None     number: of the request, from 0

It knows nothing of the client: it finds the chunk in the message by the words around it, and logs what it did.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

LONG = 5.0  # seconds of a stall; clients of the tests wait less


@dataclass
class Asked:
    """One request: what it said, its headers (names in lower case), and what was done (`answered` or a fault)."""

    body: dict[str, Any]
    headers: dict[str, str]
    outcome: str = ""
    content: str = ""

    @property
    def chunk(self) -> str:
        """The chunk, without blanks at its ends."""
        match = re.search(
            r"(?:Text|Texte|Texto) ?:\n(.*?)\n\n(?:Write|Schreibe|Écris|Escribe|Question|Frage)", self.said, re.S
        )
        return match[1] if match else ""

    @property
    def said(self) -> str:
        return str(self.body["messages"][-1]["content"])

    @property
    def is_verdict(self) -> bool:
        return "yes or no" in self.said


def reply(asked: Asked) -> str:
    """A pair about the chunk, a function of the chunk alone; as JSON."""
    sentences = [s.split() for s in re.split(r"(?<=[.!?])\s+", asked.chunk) if len(s.split()) >= 12]
    words = max(sentences, key=len) if sentences else ["Nothing"] * 12
    question = f"Which words follow “{' '.join(words[:5])}” on the page?"
    return json.dumps({"pairs": [{"question": question, "answer": " ".join(words[5:12])}]})


@dataclass
class ScriptedServer:
    """faults and reply may be changed at any time; `log` grows by a line a request."""

    faults: Callable[[int, Asked], str | None] = lambda number, asked: None
    reply: Callable[[Asked], str] = reply
    error: Callable[[Asked], str] = lambda asked: f"wrong, {asked.headers.get('authorization')}"
    latency: float = 0.0
    retry_after: str = "0.05"
    knows_schema: bool = True
    headers: dict[str, str] = field(default_factory=dict)  # of answers
    usage: dict[str, int] = field(default_factory=lambda: {"prompt_tokens": 1000, "completion_tokens": 50})
    log: list[Asked] = field(default_factory=list)
    most_at_once: int = 0
    url: str = ""
    _at_once: int = 0

    def answered(self) -> list[Asked]:
        return [asked for asked in self.log if asked.outcome == "answered"]

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._one(reader, writer):
                pass
        with contextlib.suppress(ConnectionError):
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        asked = Asked(body, headers)
        number = len(self.log)
        self.log.append(asked)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await asyncio.sleep(self.latency)
            asked.outcome = self.faults(number, asked) or "answered"
            if not self.knows_schema and "response_format" in body:
                asked.outcome = "no schema"
            return await self._respond(asked, writer)
        finally:
            self._at_once -= 1

    async def _respond(self, asked: Asked, writer: asyncio.StreamWriter) -> bool:
        outcome = asked.outcome
        if outcome == "stall":
            await asyncio.sleep(LONG)
            return False
        if outcome == "reset":
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.close()
            return False
        asked.content = "" if outcome == "empty" else self.reply(asked)
        told: dict[str, Any] = {
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": asked.content}, "finish_reason": "stop"}
            ],
            "usage": self.usage,
        }
        data = json.dumps(told).encode()
        if outcome == "broken json":
            data = data[: len(data) // 2]
        status, extra = "200 OK", dict(self.headers)
        if outcome == "no schema":
            status, data = "400 Bad Request", b'{"error": "response_format is not supported"}'
        elif outcome == "429":
            status, data, extra = "429 Too Many Requests", b'{"error": "slow down"}', {"Retry-After": self.retry_after}
        elif outcome.isdigit():
            status, data = f"{outcome} Wrong", self.error(asked).encode()
        lines = "".join(f"{name}: {value}\r\n" for name, value in extra.items())
        writer.write(f"HTTP/1.1 {status}\r\n{lines}Content-Length: {len(data)}\r\n\r\n".encode())
        writer.write(data[: len(data) // 2] if outcome == "cut" else data)
        await writer.drain()
        return outcome != "cut"


@contextlib.contextmanager
def running(server: ScriptedServer) -> Iterator[ScriptedServer]:
    """`server`, listening on a free port of this machine."""
    loop = asyncio.new_event_loop()
    listening = loop.run_until_complete(asyncio.start_server(server.handle, "127.0.0.1", 0, limit=1 << 20))
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def end() -> None:
        listening.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
