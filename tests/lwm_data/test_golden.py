"""Datasets of every version of the format open for ever, and today's writer gives the same bytes as the last one's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lwm_data.format import shard as shard_module
from lwm_data.format.dataset import FORMAT_VERSION, open_dataset
from lwm_data.format.packed import PackedSequence, merge_runs
from lwm_data.format.shard import ShardWriter

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("tokens", "vision_mask", "segment_ids", "position_ids", "loss_weights")
each_golden = pytest.mark.parametrize("name", ["v1-masked", "v1-naive", "v2-masked", "v2-naive"])
each_kind = pytest.mark.parametrize("kind", ["masked", "naive"])


@each_golden
def test_the_arrays_are_those_of_the_day_it_was_written(name: str) -> None:
    dataset = open_dataset(GOLDEN / name)
    expected = np.load(GOLDEN / name / "expected.npz")
    assert len(dataset) == len(expected["tokens"]) and len(dataset.info.shards) > 1
    length = dataset.info.row_length
    slices = [(0, length), (0, 1), (1, 2), (length - 1, length), (length // 3, length // 2)]
    for opened in (dataset, open_dataset(f"file://{GOLDEN / name}")):  # from the mapped file, and by ranges
        for field in NAMES:
            for start, stop in slices:
                wanted = expected[field][:, start:stop]
                rows = [opened.read(row, start, stop)[field] for row in range(len(dataset))]  # type: ignore[literal-required]
                batch = opened.read_batch(range(len(dataset)), start, stop)[field]  # type: ignore[literal-required]
                for got in (np.stack(rows), batch):
                    assert got.dtype == wanted.dtype
                    np.testing.assert_array_equal(got, wanted, err_msg=f"{field} {start}..{stop}")


@each_golden
def test_its_runs_count_the_trained_tokens(name: str) -> None:
    dataset = open_dataset(GOLDEN / name)
    expected = np.load(GOLDEN / name / "expected.npz")["loss_weights"] > 0
    trained = [int(dataset.packed(row).trained_lengths.sum()) for row in range(len(dataset))]
    assert trained == expected.sum(axis=1).tolist() and sum(trained) == dataset.info.num_trained


@each_golden
def test_the_tokenizer_it_carries_reads_its_text(name: str) -> None:
    dataset = open_dataset(GOLDEN / name)
    rows = dataset.read_batch(range(len(dataset)))
    assert "peeped into the" in dataset.text_tokenizer.decode(rows["tokens"][~rows["vision_mask"]])


@each_golden
def test_a_newer_version_is_refused_by_number_with_a_remedy(name: str, tmp_path: Path) -> None:
    copy = tmp_path / name
    shutil.copytree(GOLDEN / name, copy)
    index = json.loads((copy / "index.json").read_text(encoding="utf-8"))
    (copy / "index.json").write_text(json.dumps(index | {"format_version": 3, "new_field": []}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"index\.json: format_version: got 3; .* reads 1 to 2; update lwm"):
        open_dataset(copy)


@each_kind
def test_today_s_writer_gives_the_same_bytes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the rows of the last version as they are, and for those of the first with their runs merged."""
    golden = open_dataset(GOLDEN / f"v{FORMAT_VERSION}-{kind}")
    info, dtype = golden.info, np.dtype(golden.info.dtype)
    monkeypatch.setattr(shard_module, "PAGE_BYTES", info.rows_per_page * info.row_length * dtype.itemsize)
    for dataset in (golden, open_dataset(GOLDEN / f"v1-{kind}")):
        row = 0
        for shard in info.shards:
            with ShardWriter(tmp_path / shard.name, info.row_length, dtype) as writer:
                for _ in range(shard.num_rows):
                    packed = dataset.packed(row)
                    writer.add(PackedSequence(packed.tokens, *merge_runs(packed.runs, packed.weights)))
                    row += 1
            assert (tmp_path / shard.name).read_bytes() == (Path(golden.url) / shard.name).read_bytes()
            written = (writer.sha256, writer.num_bytes, writer.num_rows, writer.offsets_at)
            assert written == (shard.sha256, shard.num_bytes, shard.num_rows, shard.offsets_at)


@each_kind
def test_the_last_version_has_fewer_and_narrower_runs_than_the_first(kind: str) -> None:
    first, last = (open_dataset(GOLDEN / f"v{version}-{kind}") for version in (1, FORMAT_VERSION))
    num_runs = [sum(len(of.packed(row).runs) for row in range(len(of))) for of in (first, last)]
    assert num_runs[1] < num_runs[0]
    last.read_batch([0])
    assert last._open[0].read_runs(0)[0].dtype == np.uint16
