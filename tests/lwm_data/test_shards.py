"""From records to rows on disk and back, by our reader, by webdataset and by datasets."""

from __future__ import annotations

import itertools
import pickle
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_data.check import check_dataset
from lwm_data.format.dataset import Dataset, open_dataset
from lwm_data.format.example import Run, text_runs, vision_runs
from lwm_data.format.vocab import TextTokenizer
from lwm_data.sources.record import Record

ROW = 1100
NAMES = ("tokens", "vision_mask", "segment_ids", "position_ids", "loss_weights")


def _record(tokenizer: TextTokenizer, key: str, rng: np.random.Generator, num_frames: int) -> Record:
    """Text of random ids, trained here and there; with `num_frames`, a vision block inside."""
    runs = list(text_runs(tokenizer, [], eos=False))
    for _ in range(int(rng.integers(1, 4))):
        ids = rng.integers(3, tokenizer.vocab_size, rng.integers(1, 60)).astype(np.int32)
        runs.append(Run(ids, False, bool(rng.integers(2))))
    if num_frames:
        codes = rng.integers(0, 8192, (num_frames, 256)).astype(np.int32)
        at = int(rng.integers(1, len(runs) + 1))
        runs[at:at] = vision_runs(tokenizer, codes, trained=bool(rng.integers(2)))
    if rng.integers(2):
        runs.append(Run(np.array([tokenizer.eos], np.int32), False, True))
    return Record(key, tuple(runs))


def _records(tokenizer: TextTokenizer, seed: int, frames: list[int]) -> list[Record]:
    rng = np.random.default_rng(seed)
    return [_record(tokenizer, f"key{i}", rng, num_frames) for i, num_frames in enumerate(frames)]


def _flat(record: Record) -> tuple[Any, ...]:
    """(token, is vision, is trained) of each token."""
    return tuple((int(token), run.is_vision, run.trained) for run in record.runs for token in run.tokens)


@given(seed=st.integers(0, 2**32), frames=st.lists(st.sampled_from([0, 0, 1, 3]), min_size=1, max_size=20))
def test_every_example_comes_back_whole_and_each_token_once(
    dataset_of: Callable[..., Dataset], demo_tokenizer: TextTokenizer, seed: int, frames: list[int]
) -> None:
    records = _records(demo_tokenizer, seed, frames)
    with tempfile.TemporaryDirectory() as folder:
        dataset = dataset_of(Path(folder), records, row_length=ROW)
        assert check_dataset(dataset, lambda rows: None) == []
        found: Counter[Any] = Counter()
        for row in range(len(dataset)):
            arrays = dataset[row]
            segments = arrays["segment_ids"]
            assert set(np.unique(segments)) - {0} == set(range(1, segments.max() + 1))
            assert not arrays["tokens"][segments == 0].any() and not arrays["loss_weights"][segments == 0].any()
            for segment in range(1, segments.max() + 1):
                at = np.flatnonzero(segments == segment)
                assert (np.diff(at) == 1).all()
                assert arrays["position_ids"][at].tolist() == list(range(len(at)))
                weights = arrays["loss_weights"][at].astype(np.float64)
                assert weights[0] == 0, "no target crosses a segment's border"
                if weights.any():
                    assert abs(weights.sum() - 1) < 1e-5
                columns = (arrays["tokens"][at], arrays["vision_mask"][at], weights > 0)
                found[tuple(zip(*(column.tolist() for column in columns), strict=True))] += 1
        assert found == Counter(_flat(record) for record in records)


@given(seed=st.integers(0, 2**32), num=st.integers(1, 20), row_length=st.integers(2, 300))
def test_naive_rows_are_the_examples_end_to_end(
    dataset_of: Callable[..., Dataset], demo_tokenizer: TextTokenizer, seed: int, num: int, row_length: int
) -> None:
    records = _records(demo_tokenizer, seed, [0, 1, 0][:num] + [0] * max(0, num - 3))
    with tempfile.TemporaryDirectory() as folder:
        dataset = dataset_of(Path(folder), records, row_length=row_length, packing="naive", weighting="token")
        assert check_dataset(dataset, lambda rows: None) == []
        flat = [token for record in records for token in _flat(record)]
        assert len(dataset) == -(-len(flat) // row_length)
        for row in range(len(dataset)):
            arrays = dataset[row]
            wanted = flat[row * row_length : (row + 1) * row_length]
            size = len(wanted)
            assert arrays["tokens"][:size].tolist() == [token for token, _, _ in wanted]
            assert arrays["vision_mask"][:size].tolist() == [is_vision for _, is_vision, _ in wanted]
            assert arrays["loss_weights"][1:size].tolist() == [float(trained) for _, _, trained in wanted[1:]]
            assert arrays["loss_weights"][0] == 0
            assert arrays["segment_ids"].tolist() == [1] * size + [0] * (row_length - size)
            assert arrays["position_ids"][:size].tolist() == list(range(size))


@pytest.fixture(scope="module")
def mixed(
    dataset_of: Callable[..., Dataset], demo_tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Dataset:
    """17 rows of 1,100 in shards of 3, text and vision."""
    records = _records(demo_tokenizer, 7, [0, 0, 3, 0, 1] * 12)
    dataset = dataset_of(tmp_path_factory.mktemp("mixed"), records, row_length=ROW)
    assert len(dataset) > 6 and len(dataset.info.shards) > 2
    return dataset


@given(data=st.data())
def test_a_slice_read_from_disk_is_the_slice_of_the_row(mixed: Dataset, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, len(mixed) - 1))
    start = data.draw(st.integers(0, ROW - 1))
    stop = data.draw(st.integers(start + 1, ROW))
    whole, part = mixed[row], mixed.read(row, start, stop)
    for name in NAMES:
        np.testing.assert_array_equal(part[name], whole[name][start:stop])  # type: ignore[literal-required]
        assert part[name].dtype == whole[name].dtype  # type: ignore[literal-required]


@given(data=st.data())
def test_a_batch_is_its_rows_one_by_one(mixed: Dataset, data: st.DataObject) -> None:
    """Rows of one shard or of several, in any order, also the same twice; from the mapped file, and over a URL."""
    last = data.draw(st.sampled_from([len(mixed) - 1, mixed.info.shards[0].num_rows - 1]))
    rows = data.draw(st.lists(st.integers(0, last), min_size=1, max_size=12))
    start = data.draw(st.sampled_from([0, 0, 1, 500]))
    stop = data.draw(st.sampled_from([ROW, ROW, ROW - 1, 501]))
    for dataset in (mixed, open_dataset(f"file://{mixed.url}")):
        dataset.will_need(rows, start, stop)
        batch = dataset.read_batch(rows, start, stop)
        for name in NAMES:
            wanted = np.stack([mixed.read(row, start, stop)[name] for row in rows])  # type: ignore[literal-required]
            np.testing.assert_array_equal(batch[name], wanted, err_msg=name)  # type: ignore[literal-required]
            assert batch[name].dtype == wanted.dtype  # type: ignore[literal-required]
        tokens = dataset.read_tokens(rows, start, stop)
        np.testing.assert_array_equal(tokens, batch["tokens"])
        assert tokens.dtype == np.uint16


@given(data=st.data())
def test_slices_of_a_row_tile_it(mixed: Dataset, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, len(mixed) - 1))
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, ROW - 1), max_size=6))), ROW]
    tiles = [mixed.read(row, start, stop) for start, stop in itertools.pairwise(cuts)]
    for name in NAMES:
        joined = np.concatenate([tile[name] for tile in tiles])  # type: ignore[literal-required]
        np.testing.assert_array_equal(joined, mixed[row][name])  # type: ignore[literal-required]


def test_rows_and_slices_that_are_not_there_are_named(mixed: Dataset) -> None:
    for rows in ([len(mixed)], [0, -1]):
        with pytest.raises(IndexError, match=f"row {rows[-1]}; it has rows 0 to {len(mixed) - 1}"):
            mixed.read_batch(rows)
    with pytest.raises(ValueError, match=rf"tokens 5\.\.{ROW + 1} of a row of 1,100"):
        mixed.read_tokens([0], 5, ROW + 1)


def test_another_process_opens_the_files_for_itself(mixed: Dataset) -> None:
    mixed.read_batch([0, len(mixed) - 1])
    copy = pickle.loads(pickle.dumps(mixed))
    assert not copy._open
    np.testing.assert_array_equal(copy[1]["tokens"], mixed[1]["tokens"])


def test_the_same_rows_come_over_an_fsspec_url(mixed: Dataset) -> None:
    remote = open_dataset(f"file://{mixed.url}")
    assert len(remote) == len(mixed)
    for row in (0, len(mixed) - 1):
        for name in NAMES:
            np.testing.assert_array_equal(remote[row][name], mixed[row][name])  # type: ignore[literal-required]
    assert remote.text_tokenizer == mixed.text_tokenizer


def _from_page(sample: dict[str, Any]) -> list[dict[str, np.ndarray]]:
    """The five arrays of a page's rows, derived token by token from the format's description alone."""
    rows = []
    for r, tokens in enumerate(np.asarray(sample["tokens.npy"])):
        first, last = int(sample["row_starts.npy"][r]), int(sample["row_starts.npy"][r + 1])
        columns: dict[str, list[Any]] = {name: [] for name in NAMES[1:]}
        before, position = 0, 0
        for i in range(first, last):
            length, segment, vision = map(int, sample["runs.npy"][i])
            for _ in range(length):
                position = 0 if segment != before or segment == 0 else position + 1
                before = segment
                weight = sample["weights.npy"][i] if position else np.float32(0)
                values = (bool(vision), segment, position, weight)
                for column, value in zip(columns.values(), values, strict=True):
                    column.append(value)
        rows.append({"tokens": tokens} | {name: np.array(column) for name, column in columns.items()})
    return rows


def _assert_equal(rows: list[dict[str, np.ndarray]], dataset: Dataset) -> None:
    assert len(rows) == len(dataset)
    for i, row in enumerate(rows):
        for name in NAMES:
            np.testing.assert_array_equal(row[name], dataset[i][name], err_msg=name)  # type: ignore[literal-required]


@pytest.mark.filterwarnings("ignore")
def test_webdataset_reads_the_same_arrays(mixed: Dataset) -> None:
    import webdataset

    paths = [f"{mixed.url}/{shard.name}" for shard in mixed.info.shards]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    assert len(samples) == len(paths)
    _assert_equal([row for sample in samples for row in _from_page(sample)], mixed)


@pytest.mark.filterwarnings("ignore")
def test_datasets_reads_the_same_arrays(mixed: Dataset, tmp_path: Path) -> None:
    import datasets

    paths = [f"{mixed.url}/{shard.name}" for shard in mixed.info.shards]
    samples = datasets.load_dataset(
        "webdataset", data_files=paths, split="train", cache_dir=str(tmp_path / "cache")
    ).with_format("numpy")
    assert len(samples) == len(paths)
    _assert_equal([row for sample in samples for row in _from_page(sample)], mixed)
