"""A host that owns a slice of a long row reads the bytes of that slice, from a disk or over a URL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from lwm_data.format.dataset import Dataset, DatasetInfo, ShardInfo, open_dataset, write_index
from lwm_data.format.packed import PackedSequence
from lwm_data.format.ranges import open_ranges
from lwm_data.format.shard import ShardWriter
from lwm_data.format.vocab import TextTokenizer

LONG = 1 << 20
NAMES = ("tokens", "vision_mask", "segment_ids", "position_ids", "loss_weights")


@pytest.fixture(scope="module")
def long_row(tmp_path_factory: pytest.TempPathFactory, demo_tokenizer: TextTokenizer) -> Dataset:
    """One row of 1,048,576 tokens: 700 documents, each of BOS and text that is trained."""
    folder = tmp_path_factory.mktemp("long")
    rng = np.random.default_rng(0)
    lengths = np.full(700, LONG // 700, np.int64)
    lengths[-1] += LONG - lengths.sum()
    runs = np.zeros((1400, 3), np.uint32)
    runs[::2, 0], runs[1::2, 0] = 1, lengths - 1
    runs[:, 1] = np.repeat(np.arange(700) + 1, 2)
    weights = np.zeros(1400, np.float32)
    weights[1::2] = 1 / (lengths - 1)
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
            format_version=1,
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
    table = 1400 * 16 + 8
    assert len(asked) == 2 and sum(asked) <= 1.2 * (2 * LONG // 64 + table)
    whole = long_row[0]
    for name in NAMES:
        wanted = whole[name][LONG // 2 : LONG // 2 + LONG // 64]  # type: ignore[literal-required]
        np.testing.assert_array_equal(part[name], wanted)  # type: ignore[literal-required]


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
