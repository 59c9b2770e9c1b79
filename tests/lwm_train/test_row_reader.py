"""Each process reads only its part, and the parts are the batch; 64 hosts are 64 parts here."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from lwm_data.format.dataset import Dataset, open_dataset
from lwm_data.format.example import Run
from lwm_data.sources.record import Record
from lwm_train.config import MeshSpec
from lwm_train.loader import Loader
from lwm_train.mesh import make_mesh
from lwm_train.row_reader import Part, RowAddress, part_of_process, read_part

LONG = 1 << 20
HOSTS = 64
TABLES = 2056  # bytes of a row's run tables: three short members of a tar, from the first to the last
MakeDataset = Callable[..., Dataset]


class CountingFileSystem(LocalFileSystem):
    """Local files that count the bytes of each range that is asked for."""

    protocol = "counting"
    num_bytes = 0

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: object) -> bytes:
        data: bytes = super().cat_file(path.removeprefix("counting://"), start=start, end=end, **kwargs)
        CountingFileSystem.num_bytes += len(data)
        return data

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = LocalFileSystem._strip_protocol(path.removeprefix("counting://"))
        return stripped


def random_record(key: str, num_tokens: int) -> Record:
    ids = np.random.default_rng(num_tokens).integers(3, 500, num_tokens).astype(np.int32)
    return Record(key, (Run(ids[:1], is_vision=False, trained=False), Run(ids[1:], is_vision=False, trained=True)))


@pytest.fixture(scope="module")
def long_rows(dataset_of: MakeDataset, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of two rows of 1M tokens, over the file system that counts."""
    records = [random_record("book", LONG), random_record("a", LONG - 70_000), random_record("b", 60_000)]
    dataset = dataset_of(tmp_path_factory.mktemp("long"), records, LONG)
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    return f"counting://{dataset.url}"


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_each_of_64_hosts_reads_the_bytes_of_its_slice_of_a_row_of_a_million_tokens(order: str, long_rows: str) -> None:
    share = LONG // HOSTS
    for host in (0, 1, 31, 62, 63):
        dataset = open_dataset(long_rows)
        CountingFileSystem.num_bytes = 0
        part = Part(np.arange(2), np.arange(host * share, (host + 1) * share))
        batch = read_part([dataset], [RowAddress(0, 0), RowAddress(0, 1)], part, order, HOSTS)
        assert batch.tokens.shape == (2, share)
        slice_bytes = 2 * share + TABLES
        assert CountingFileSystem.num_bytes <= 1.05 * 2 * slice_bytes  # of two rows, two bytes a token


@pytest.fixture(scope="module")
def short_rows(dataset_of: MakeDataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A dataset of rows of 1,024 tokens, each of several segments."""
    sizes = [1000, 700, 300, 520, 400, 90, 900, 120, 640, 380]
    records = [random_record(str(i), size) for i, size in enumerate(sizes)]
    return dataset_of(tmp_path_factory.mktemp("short"), records, 1024)


@pytest.mark.parametrize("order", ["contiguous", "zigzag", "striped", "dealt", "auto"])
def test_the_parts_of_all_processes_are_the_batch(order: str, short_rows: Dataset) -> None:
    addresses = [RowAddress(0, row) for row in (3, 0, 2, 1)]
    ring, length = 4, 1024
    everything = Part(np.arange(4), np.arange(length))
    whole = read_part([short_rows], addresses, everything, order, ring)
    for rows in (np.array([0, 1]), np.array([2, 3])):
        for place in range(ring):
            tokens = np.arange(place * 256, (place + 1) * 256)
            part = read_part([short_rows], addresses, Part(rows, tokens), order, ring)
            for mine, of_all in zip(jax.tree.leaves(part), jax.tree.leaves(whole), strict=True):
                np.testing.assert_array_equal(mine, of_all[np.ix_(rows, tokens)])


def test_the_rows_of_a_step_and_their_numbers_are_the_same_on_every_mesh(short_rows: Dataset) -> None:
    def batches(mesh: MeshSpec) -> list[list[np.ndarray]]:
        loader = Loader([short_rows], [1.0], 5, 2, make_mesh(mesh), "contiguous")
        assert [loader.rows(step) for step in range(6)] == rows
        return [[np.asarray(a) for a in jax.tree.leaves(batch)] for batch in loader.batches(0, 6)]

    rows = [Loader([short_rows], [1.0], 5, 2, make_mesh(MeshSpec()), "contiguous").rows(step) for step in range(6)]
    first = batches(MeshSpec())
    for mesh in (MeshSpec(fsdp=2), MeshSpec(sp=4), MeshSpec(dp=2, sp=2, tp=2)):
        for a, b in zip(batches(mesh), first, strict=True):
            for x, y in zip(a, b, strict=True):
                np.testing.assert_array_equal(x, y)


def test_a_process_with_all_devices_holds_all() -> None:
    part = part_of_process(make_mesh(MeshSpec(dp=2, sp=4)), 4, 64)
    np.testing.assert_array_equal(part.rows, np.arange(4))
    np.testing.assert_array_equal(part.tokens, np.arange(64))


def test_memory_stays_where_it_is_over_ten_thousand_rows(short_rows: Dataset, tmp_path: Path) -> None:
    loader = Loader([short_rows], [1.0], 0, 20, make_mesh(MeshSpec()), "contiguous")
    peaks = []
    for step, _ in enumerate(loader.batches(0, 500)):
        if step in (100, 499):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[1] - peaks[0] < 8_000  # kB; 8,000 rows of 28 kB went by
    assert not any(thread.name == "loader" for thread in threading.enumerate())
