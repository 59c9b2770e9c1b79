"""A host that owns a slice of a long row reads the bytes of that slice, from a disk or over a URL."""

from __future__ import annotations

import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import numpy as np
import pytest

from lwm_data.format.dataset import FORMAT_VERSION, Dataset, DatasetInfo, ShardInfo, open_dataset, write_index
from lwm_data.format.packed import PackedSequence
from lwm_data.format.ranges import open_ranges
from lwm_data.format.shard import ShardWriter
from lwm_data.format.vocab import TextTokenizer

LONG = 1 << 20
TABLE = 700 * 16 + 8  # bytes of the run table of the row below
NAMES = ("tokens", "vision_mask", "segment_ids", "position_ids", "loss_weights")


@pytest.fixture(scope="module")
def long_row(tmp_path_factory: pytest.TempPathFactory, demo_tokenizer: TextTokenizer) -> Dataset:
    """One row of 1,048,576 tokens: 700 documents, each of BOS and text that is trained."""
    folder = tmp_path_factory.mktemp("long")
    rng = np.random.default_rng(0)
    lengths = np.full(700, LONG // 700, np.int64)
    lengths[-1] += LONG - lengths.sum()
    runs = np.zeros((700, 3), np.uint32)
    runs[:, 0], runs[:, 1] = lengths, np.arange(700) + 1
    weights = (1 / (lengths - 1)).astype(np.float32)
    with ShardWriter(folder / "shard-000000.tar", LONG, np.dtype(np.uint16)) as writer:
        writer.add(PackedSequence(rng.integers(3, 2000, LONG).astype(np.int32), runs, weights))
    shard = ShardInfo(
        name="shard-000000.tar",
        num_rows=1,
        num_bytes=writer.num_bytes,
        sha256=writer.sha256,
        offsets_at=writer.offsets_at,
        examples_sha256="",
    )
    write_index(
        folder,
        DatasetInfo(
            format_version=FORMAT_VERSION,
            name="long",
            row_length=LONG,
            rows_per_page=1,
            dtype="uint16",
            packing="masked",
            loss_weighting="example",
            num_rows=1,
            num_tokens=LONG,
            num_trained=LONG - 700,
            text_vocab_size=demo_tokenizer.vocab_size,
            tokenizer_fingerprint=demo_tokenizer.fingerprint,
            build_fingerprint="",
            sources={},
            rejected={},
            manifest={},
            shards=(shard,),
        ),
    )
    return open_dataset(folder)


@pytest.mark.parametrize("remote", [False, True])
def test_a_64th_of_a_long_row_asks_for_its_own_bytes(
    long_row: Dataset, remote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 1.2 times its tokens and the row's run table, in two ranges: from a disk, and over an fsspec URL."""
    url = long_row.url
    if remote:
        url = "memory://long"
        memory = fsspec.filesystem("memory")
        memory.put(long_row.url, "/long", recursive=True)
    dataset = open_dataset(url)
    dataset.read(0, 0, 1)  # opens the shard
    shard = dataset._open[0]
    asked: list[int] = []
    ranges = type(shard._ranges)
    read, read_into = ranges.read, ranges.read_into
    if remote:
        cat_file = type(memory).cat_file

        def counting_cat(self: Any, path: str, start: int, end: int) -> bytes:
            asked.append(end - start)
            data: bytes = cat_file(self, path, start=start, end=end)
            return data

        monkeypatch.setattr(type(memory), "cat_file", counting_cat)
    else:

        def counting_read(self: Any, start: int, stop: int) -> bytes:
            asked.append(stop - start)
            return read(self, start, stop)

        def counting_read_into(self: Any, start: int, out: memoryview) -> None:
            asked.append(len(out))
            read_into(self, start, out)

        monkeypatch.setattr(ranges, "read", counting_read)
        monkeypatch.setattr(ranges, "read_into", counting_read_into)
    shard._last = (-1, b"")  # as of a row that was not read before
    part = dataset.read(0, LONG // 2, LONG // 2 + LONG // 64)
    assert len(asked) == 2 and sum(asked) <= 1.2 * (2 * LONG // 64 + TABLE)
    whole = long_row[0]
    for name in NAMES:
        wanted = whole[name][LONG // 2 : LONG // 2 + LONG // 64]  # type: ignore[literal-required]
        np.testing.assert_array_equal(part[name], wanted)  # type: ignore[literal-required]


class FileServer:
    """Serves a folder on the loopback, by HTTP. `ranges`: does it do what Range asks for? `sent`: bytes of bodies."""

    def __init__(self, folder: str, *, ranges: bool) -> None:
        self.sent = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(with_body=False)

            def do_GET(self) -> None:
                self.answer(with_body=True)

            def answer(self, *, with_body: bool) -> None:
                path = Path(folder) / Path(self.path).name
                whole = path.read_bytes() if path.is_file() else b""
                asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if not path.is_file():
                    self.send_response(404)
                elif asked and ranges:
                    first, last = int(asked[1]), int(asked[2])
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {first}-{last}/{len(whole)}")
                    whole = whole[first : last + 1]
                else:
                    self.send_response(200)
                self.send_header("Content-Length", str(len(whole)))
                self.end_headers()
                if with_body:
                    outer.sent += len(whole)
                    self.wfile.write(whole)

            def log_message(self, *words: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FileServer:
        return self

    def __exit__(self, *raised: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def test_a_64th_of_a_long_row_over_http_is_served_as_its_own_bytes(long_row: Dataset) -> None:
    start, stop = LONG // 2, LONG // 2 + LONG // 64
    with FileServer(long_row.url, ranges=True) as server:
        dataset = open_dataset(server.url)
        dataset.read_tokens([0], 0, 1)  # opens the shard
        server.sent = 0
        tokens = dataset.read_tokens([0], start, stop)[0]
        assert server.sent <= 1.2 * 2 * LONG // 64
        server.sent = 0
        part = dataset.read(0, start, stop)
        assert server.sent <= 1.2 * (2 * LONG // 64 + TABLE)
        server.sent = 0
        dataset.read(0, stop, stop + LONG // 64)  # the run table is there already
        assert server.sent <= 1.2 * 2 * LONG // 64
    wanted = long_row.read(0, start, stop)
    np.testing.assert_array_equal(tokens, wanted["tokens"])
    for name in NAMES:
        np.testing.assert_array_equal(part[name], wanted[name])  # type: ignore[literal-required]


def test_an_http_server_without_ranges_is_an_error_that_says_so(long_row: Dataset) -> None:
    with FileServer(long_row.url, ranges=False) as server:
        dataset = open_dataset(server.url)
        assert dataset.info == long_row.info
        with pytest.raises(ValueError, match="the server does not serve ranges of a file; use one that does"):
            dataset.read(0, 0, 100)


def test_long_rows_come_in_batches_too(long_row: Dataset) -> None:
    batch, row = long_row.read_batch([0, 0], 1000, LONG), long_row.read(0, 1000, LONG)
    for name in NAMES:
        for got in batch[name]:  # type: ignore[literal-required]
            np.testing.assert_array_equal(got, row[name])  # type: ignore[literal-required]


def test_a_truncated_file_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(bytes(100))
    for url in (str(path), f"file://{path}"):
        with pytest.raises(ValueError, match="20 of 30 bytes at 80: truncated"):
            open_ranges(url).read(80, 110)
        with pytest.raises(ValueError, match="20 of 30 bytes at 80: truncated"):
            open_ranges(url).read_into(80, memoryview(bytearray(30)))
