"""Row order is a function of (seed, step): every row once an epoch, shares exact, nothing to remember."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_data.build import build
from lwm_data.format.dataset import Dataset, open_dataset
from lwm_train.config import MeshSpec
from lwm_train.loader import Loader, _permuted, rows_at
from lwm_train.mesh import make_mesh

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4)
weights = st.lists(st.floats(0.05, 5), min_size=4, max_size=4)


@given(size=st.integers(1, 300), key=st.text(max_size=5))
def test_a_keyed_permutation_visits_every_index_once(size: int, key: str) -> None:
    assert sorted(_permuted(i, size, key) for i in range(size)) == list(range(size))


def test_two_epochs_have_different_orders() -> None:
    assert [_permuted(i, 100, "0/0/0") for i in range(100)] != [_permuted(i, 100, "0/0/1") for i in range(100)]


@given(num_rows=sizes, shares=weights, batch_rows=st.integers(1, 7), seed=st.integers(0, 9))
def test_each_dataset_visits_all_its_rows_once_an_epoch(
    num_rows: list[int], shares: list[float], batch_rows: int, seed: int
) -> None:
    shares = shares[: len(num_rows)]
    steps = 60
    draws = [a for step in range(steps) for a in rows_at(seed, step, batch_rows, num_rows, shares)]
    for dataset, size in enumerate(num_rows):
        rows = [a.row for a in draws if a.dataset == dataset]
        for epoch in range(len(rows) // size):
            assert sorted(rows[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(shares=weights, steps=st.integers(1, 200), batch_rows=st.integers(1, 7))
def test_shares_are_exact_to_a_few_rows_at_every_step(shares: list[float], steps: int, batch_rows: int) -> None:
    counts = Counter(a.dataset for s in range(steps) for a in rows_at(0, s, batch_rows, [1000] * 4, shares))
    for dataset, share in enumerate(shares):
        assert abs(counts[dataset] - steps * batch_rows * share / sum(shares)) <= dataset + 1


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A dataset of real text in rows of 64."""
    import json
    import shutil

    root = Path(__file__).parents[2]
    folder = tmp_path_factory.mktemp("loader")
    text = (root / "manifests/demo/novels/alice_in_wonderland.txt").read_text(encoding="utf-8")[:20_000]
    (folder / "book.txt").write_text(text, encoding="utf-8")
    for name in ("demo-text.yaml", "demo-text.model"):
        shutil.copy(root / "tokenizers" / name, folder)
    manifest = {
        "kind": "dataset",
        "name": "small",
        "out": "out",
        "text_tokenizer": "demo-text.yaml",
        "row_length": 64,
        "sources": [{"name": "book", "type": "books", "path": "book.txt"}],
    }
    (folder / "dataset.yaml").write_text(json.dumps(manifest), encoding="utf-8")
    build(folder / "dataset.yaml", (), 1)
    return open_dataset(folder / "out")


@pytest.mark.parametrize("order", ["contiguous", "zigzag", "dealt"])
def test_batches_from_any_step_on_are_the_tail_of_the_whole(small: Dataset, order: str) -> None:
    def tokens(start: int) -> list[np.ndarray]:
        mesh = make_mesh(MeshSpec(dp=2, sp=2))
        loader = Loader([small], [1.0], 3, 4, mesh, order)
        return [np.asarray(batch.tokens) for batch in loader.batches(start, 8)]

    whole = tokens(0)
    for start in range(1, 8):
        np.testing.assert_array_equal(tokens(start), whole[start:])


def test_the_order_of_tokens_moves_every_array_alike_and_changes_no_target(small: Dataset) -> None:
    def triples(order: str) -> list[Counter[tuple[int, ...]]]:
        batch = Loader([small], [1.0], 0, 2, make_mesh(MeshSpec(sp=4)), order).batch(0)
        arrays = [np.asarray(a) for a in jax.tree.leaves(batch)]
        return [Counter(zip(*(a[row].tolist() for a in arrays), strict=True)) for row in range(2)]

    assert triples("zigzag") == triples("contiguous") == triples("dealt")


def test_a_truncated_shard_is_named_where_the_step_asks_for_it(small: Dataset, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(small.url, copy)
    shard = copy / small.info.shards[0].name
    shard.write_bytes(shard.read_bytes()[:-1000])
    loader = Loader([open_dataset(copy)], [1.0], 0, 2, make_mesh(MeshSpec()), "contiguous")
    with pytest.raises(ValueError, match=r"shard-000000\.tar.*bytes, the index says"):
        list(loader.batches(0, 2))


def test_leaving_early_ends_the_thread(small: Dataset) -> None:
    import threading

    make: Callable[[], Loader] = lambda: Loader([small], [1.0], 0, 2, make_mesh(MeshSpec()), "contiguous")  # noqa: E731
    batches = make().batches(0, 1000)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not any(thread.name == "loader" for thread in threading.enumerate())
