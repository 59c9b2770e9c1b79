"""How busy `lwm-data qa` keeps a server: chunks of real novels, a server in its own process that takes 50 ms for each.

    .venv/bin/python benchmarks/qa_endpoint.py [--chunks 1000 10000] [--concurrency 64]

busy    served requests * 50 ms / (concurrency * seconds from the first request to the last answer, by the server)
limit   the same for a bare loop of POSTs on the same server: what client and machine leave of it at best
peak    resident memory of the client's process; it should hardly grow with the chunks

The novels are taken several times, each copy with its number in every paragraph: a chunk that was answered before is
not asked about. They are cut before the first request, by an earlier run, so that encoding is not in the time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

from lwm_data.terminal import RunFailed

ROOT = Path(__file__).parents[1]
LATENCY = 0.05  # seconds
NOWHERE = "http://127.0.0.1:9/v1"
# Short words that stand in nearly every chunk, so that the pair passes all gates.
PAIR = {"question": "Where did Captain Ahab nail the doubloon?", "answer": "It was for all of us and it was he."}
CONTENT = json.dumps(
    {
        "choices": [{"message": {"content": json.dumps({"pairs": [PAIR]})}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1100, "completion_tokens": 30},
    }
).encode()
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
    len(CONTENT),
    CONTENT,
)


class Server(asyncio.Protocol):
    """Answers each request after LATENCY. GET: how many were served, and the seconds from the first to the last."""

    served = 0
    first = last = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.got = transport, b""

    def data_received(self, data: bytes) -> None:
        self.got += data
        head, end, rest = self.got.partition(b"\r\n\r\n")
        if not end:
            return
        if head.startswith(b"GET"):
            told = f"{Server.served} {Server.last - Server.first}".encode()
            Server.served, Server.first = 0, 0.0
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(told), told))
            self.got = b""
        elif len(rest) == int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]):
            self.got = b""
            Server.first = Server.first or time.monotonic()
            asyncio.get_running_loop().call_later(LATENCY, self.answer)

    def answer(self) -> None:
        Server.served += 1
        Server.last = time.monotonic()
        if not self.transport.is_closing():
            self.transport.write(RESPONSE)


async def serve() -> None:
    """Until the standard input ends; prints the port."""
    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


async def bare_loop(url: str, body: bytes, num: int, concurrency: int) -> None:
    """`num` POSTs of `body`, answers thrown away."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=concurrency)) as session:

        async def work(left: list[int]) -> None:
            while left:
                left.pop()
                async with session.post(url, data=body) as response:
                    await response.read()

        left = list(range(num))
        await asyncio.gather(*(work(left) for _ in range(concurrency)))


async def told(url: str) -> tuple[int, float]:
    """Requests served since it was last asked, and seconds between the first and the last."""
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        served, seconds = (await response.text()).split()
        return int(served), float(seconds)


def write_books(folder: Path, num_chunks: int) -> None:
    """Copies of the demo's novels, enough for `num_chunks` chunks of 1,000 tokens, which are 850 tokens at least."""
    novels = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "manifests/demo/novels").glob("*.txt"))]
    characters, number = 0, 0
    while characters < num_chunks * 2600:
        text = novels[number % len(novels)].replace("\n\n", f"\n\n{number} ")
        (folder / f"{number:04d}.txt").write_text(text, encoding="utf-8")
        characters += len(text)
        number += 1


def run(url: str, folder: Path, num_chunks: int, concurrency: int) -> dict[str, Any]:
    """One run of the generator in this process; with NOWHERE only as far as the cuts."""
    from lwm_data.qa.generate import generate

    manifest = {
        "kind": "qa",
        "name": "bench",
        "out": "out",
        "books": "books/*.txt",
        "text_tokenizer": str(ROOT / "tokenizers/demo-text.yaml"),
        "prompt": str(ROOT / "manifests/qa/prompts/questions.yaml"),
        "endpoint": {"url": url, "model": "bench", "concurrency": concurrency},
        "budget": {"requests": num_chunks},
    }
    (folder / "qa.yaml").write_text(json.dumps(manifest))
    try:
        summary = generate(folder / "qa.yaml").described()
    except RunFailed:  # there is no server at NOWHERE; what was to be cut is cut
        summary = {}
    return summary | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    """Measure each size in a process of its own and print a line for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve())
        return
    if args.run:
        print(json.dumps(run(args.run[0], Path(args.run[1]), args.chunks[0], args.concurrency)))
        return
    this = [sys.executable, __file__]
    with subprocess.Popen([*this, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stdin is not None
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}/v1"

        def busy() -> tuple[int, float]:
            served, seconds = asyncio.run(told(url))
            return served, served * LATENCY / (args.concurrency * seconds)

        print("  chunks   served    busy   limit   peak MiB")
        for num_chunks in args.chunks:
            asyncio.run(bare_loop(f"{url}/chat/completions", b"x" * 4500, num_chunks, args.concurrency))
            _, limit = busy()
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                (folder / "books").mkdir()
                write_books(folder / "books", num_chunks)
                sizes = ["--chunks", str(num_chunks), "--concurrency", str(args.concurrency)]
                for address in (NOWHERE, url):
                    command = [*this, "--run", address, name, *sizes]
                    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout)
            served, share = busy()
            print(f"{num_chunks:8,} {served:8,} {share:7.1%} {limit:7.1%} {found['peak']:10.0f}")
        server.stdin.close()


if __name__ == "__main__":
    main()
