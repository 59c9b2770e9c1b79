"""Check finds each kind of damage, also where whoever did it has mended the hashes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lwm_data import check
from lwm_data.check import check_dataset
from lwm_data.format.dataset import Dataset, open_dataset
from lwm_data.format.example import Run, text_runs, vision_runs
from lwm_data.format.packed import PackedSequence
from lwm_data.format.shard import ShardWriter
from lwm_data.format.vocab import TextTokenizer
from lwm_data.sources.record import Record

ROW = 640
Damage = Callable[[PackedSequence], None]


@pytest.fixture
def dataset(dataset_of: Callable[..., Dataset], demo_tokenizer: TextTokenizer, tmp_path: Path) -> Dataset:
    """Rows of 640; the first holds an image in its first segment, text in its second, and padding."""
    rng = np.random.default_rng(0)
    image = vision_runs(demo_tokenizer, rng.integers(0, 8192, (1, 256)).astype(np.int32), trained=True)
    prompt = Run(demo_tokenizer.encode("What is this?"), False, False)
    records = [Record("image", (*text_runs(demo_tokenizer, [], eos=False), prompt, *image))]
    for i in range(9):
        ids = rng.integers(3, 1024, 250).astype(np.int32)
        records.append(Record(f"text{i}", text_runs(demo_tokenizer, [(ids[:100], False), (ids, True)], eos=True)))
    made = dataset_of(tmp_path, records, row_length=ROW)
    assert made.packed(0).runs[-1, 1] == 0 and made.packed(0).runs[:, 1].max() == 2
    return made


def _check(dataset: Dataset) -> list[str]:
    return check_dataset(open_dataset(dataset.url), lambda rows: None)


def _rewrite_row(dataset: Dataset, damage: Damage) -> None:
    """Damage the first row of the first shard, and make sizes and hashes right again."""
    shard = dataset.info.shards[0]
    path = Path(dataset.url) / shard.name
    rows = []
    for i in range(shard.num_rows):
        row = dataset.packed(i)
        rows.append(PackedSequence(row.tokens.copy(), row.runs.copy(), row.weights.copy()))
    damage(rows[0])
    with ShardWriter(path, ROW, np.dtype(np.uint16)) as writer:
        for row in rows:
            writer.add(row)
    _set_shard(dataset, sha256=writer.sha256, num_bytes=writer.num_bytes, offsets_at=writer.offsets_at)


def _index(dataset: Dataset) -> Any:
    return json.loads((Path(dataset.url) / "index.json").read_text())


def _set_shard(dataset: Dataset, **keys: Any) -> None:
    index = _index(dataset)
    index["shards"][0].update(keys)
    (Path(dataset.url) / "index.json").write_text(json.dumps(index))


def _vision_run(row: PackedSequence) -> int:
    return int(np.flatnonzero(row.runs[:, 2])[0])


def _begin(row: PackedSequence, run: int) -> int:
    return int(row.runs[:run, 0].sum())


def _set_token(at: Callable[[PackedSequence], int], value: int) -> Damage:
    def damage(row: PackedSequence) -> None:
        place = at(row)
        assert row.tokens[place] != value
        row.tokens[place] = value

    return damage


def _set_run(run: int, column: int, change: int) -> Damage:
    def damage(row: PackedSequence) -> None:
        row.runs[run, column] = row.runs[run, column].astype(np.int64) + change

    return damage


def _swap_weights(row: PackedSequence) -> None:
    weights = row.weights.copy()
    trained = np.flatnonzero(weights)
    first, last = trained[0], trained[-1]
    assert weights[first] != weights[last]
    row.weights[first], row.weights[last] = weights[last], weights[first]


def _train_the_prompt(row: PackedSequence) -> None:
    row.weights[0] = 0.25


def _weigh_padding(row: PackedSequence) -> None:
    row.weights[-1] = 1


def _no_number(row: PackedSequence) -> None:
    row.weights[2] = np.nan


def _untrain(row: PackedSequence) -> None:
    row.weights[:] = 0


def _segments_backwards(row: PackedSequence) -> None:
    real = row.runs[:, 1] > 0
    row.runs[real, 1] = 3 - row.runs[real, 1]


def _in_frame(row: PackedSequence) -> int:
    return _begin(row, _vision_run(row)) + 7


def _frame_end(row: PackedSequence) -> int:
    return _begin(row, _vision_run(row)) + 256


def _before_vision(row: PackedSequence) -> int:
    return _begin(row, _vision_run(row)) - 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_set_token(lambda row: 0, 7), "token 0: id 7 begins segment 1; wanted BOS"),
        (_set_token(lambda row: ROW - 1, 9), "token 639: padding of id 9 and weight 0; wanted 0 and 0"),
        (_set_token(lambda row: 3, 1024), r"token 3: id 1024; wanted below 1024 \(text\)"),
        (_set_token(_in_frame, 8200), r"id 8200; wanted below 8194 \(vision\)"),
        (_set_token(_in_frame, 8192), "a vision block whose frames do not end in EOF"),
        (_set_token(_frame_end, 8192), "a vision block whose frames do not end in EOF, and the last in EOV"),
        (_set_token(_before_vision, 77), "a vision block without <vision> before it"),
        (_set_run(0, 0, 1), "runs: they cover 641 tokens; the row has 640"),
        (_set_run(0, 1, 4), "segments: got"),
        (_segments_backwards, "segments: got"),
        (_set_run(-1, 1, 3), "id 0 begins segment 3; wanted BOS"),
        (_set_run(1, 2, 1), "a vision block"),
        (_set_run(1, 2, 5), "a vision flag that is neither 0 nor 1"),
        (_swap_weights, "weights of segment 1 sum to"),
        (_train_the_prompt, r"token 0: weights of segment 1 sum to [\d.]+, not 1"),
        (_weigh_padding, "padding of id 0 and weight 1"),
        (_no_number, "a weight that is no number"),
        (_untrain, "the examples table says"),
    ],
)
def test_each_damage_of_a_row_is_found_with_its_place(dataset: Dataset, damage: Damage, message: str) -> None:
    assert _check(dataset) == []
    _rewrite_row(dataset, damage)
    problems = _check(dataset)
    assert any(re.search(message, problem) for problem in problems), problems
    assert all(problem.startswith(("shard-000000.tar: row 0: ", "index.json: ")) for problem in problems), problems


def test_two_workers_find_what_one_finds_in_the_same_order(dataset: Dataset) -> None:
    """Of damage in a row, in a file's bytes, and of totals."""
    index = _index(dataset) | {"num_tokens": 7}
    (Path(dataset.url) / "index.json").write_text(json.dumps(index))
    _rewrite_row(dataset, _set_token(lambda row: 3, 1024))
    path = Path(dataset.url) / dataset.info.shards[1].name
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    seen: list[int] = []
    alone, together = (check_dataset(open_dataset(dataset.url), seen.append, workers) for workers in (1, 2))
    assert alone == together and sum(seen) == 2 * len(dataset)
    assert alone[0].startswith("shard-000000.tar: row 0: token 3: id 1024") and "shard-000001.tar: sha256" in alone[1]
    assert any(problem.startswith("index.json: tokens: got 7;") for problem in alone)


def test_problems_without_end_stop_both_ways(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    _rewrite_row(dataset, _set_token(lambda row: 3, 1024))
    _set_shard(dataset, sha256="0" * 64)
    monkeypatch.setattr(check, "MAX_PROBLEMS", 2)
    for workers in (1, 2):
        first, second, last = check_dataset(open_dataset(dataset.url), lambda rows: None, workers)
        assert "shard-000000.tar: sha256" in first and "row 0: token 3" in second
        assert last == "stopped after 2 problems"


def test_a_flipped_byte_is_found(dataset: Dataset) -> None:
    path = Path(dataset.url) / dataset.info.shards[1].name
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    assert any("shard-000001.tar: sha256 is" in problem for problem in _check(dataset))


@pytest.mark.parametrize("keep", [0, 1000, -1])
def test_a_truncated_shard_is_found(dataset: Dataset, keep: int) -> None:
    path = Path(dataset.url) / dataset.info.shards[0].name
    path.write_bytes(path.read_bytes()[:keep])
    (problem,) = _check(dataset)
    assert problem.startswith("shard-000000.tar:") and "truncated" in problem


@pytest.mark.parametrize("name", ["shard-000000.tar", "shard-000001.examples.parquet"])
def test_a_missing_file_is_found(dataset: Dataset, name: str) -> None:
    (Path(dataset.url) / name).unlink()
    assert _check(dataset) == [f"{name}: no such file; build again"]


@pytest.mark.parametrize("column", ["num_tokens", "num_vision", "num_trained", "segment"])
def test_an_examples_table_that_says_something_else_is_found(dataset: Dataset, column: str) -> None:
    path = Path(dataset.url) / "shard-000000.examples.parquet"
    table = pq.read_table(path)
    values = table[column].to_pylist()
    values[1] += 1
    index = table.schema.get_field_index(column)
    pq.write_table(
        table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type)), path
    )
    _set_shard(dataset, examples_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    problems = _check(dataset)
    assert any("row 0" in problem and "the examples table says" in problem for problem in problems), problems


@pytest.mark.parametrize("key", ["num_tokens", "num_trained"])
def test_a_total_that_is_not_the_sum_is_found(dataset: Dataset, key: str) -> None:
    index = _index(dataset)
    index[key] -= 1
    (Path(dataset.url) / "index.json").write_text(json.dumps(index))
    problems = _check(dataset)
    assert any(p.startswith("index.json: ") and key.removeprefix("num_") in p for p in problems), problems


@pytest.mark.parametrize("num_rows", [1, 10**12])
def test_an_index_whose_rows_are_not_those_of_its_shards_is_not_opened(dataset: Dataset, num_rows: int) -> None:
    index = _index(dataset) | {"num_rows": num_rows}
    (Path(dataset.url) / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"num_rows is {num_rows:,}, and not what its shards have"):
        open_dataset(dataset.url)


@pytest.mark.parametrize("member", ["runs", "row_starts", "offsets"])
def test_damage_of_the_right_size_is_an_error_and_never_other_arrays(dataset: Dataset, member: str) -> None:
    """A flipped bit costs no byte, so only what the tables say of each other can tell; their hash is for `check`."""
    shard = dataset.info.shards[0]
    path = Path(dataset.url) / shard.name
    whole = bytearray(path.read_bytes())
    offsets = np.frombuffer(whole, "<u8", 4, shard.offsets_at).tolist()
    at = {"runs": offsets[1] + 1, "row_starts": offsets[3] + 7, "offsets": shard.offsets_at + 3}[member]
    whole[at] ^= 0x40
    path.write_bytes(whole)
    damaged = open_dataset(dataset.url)
    for read in (lambda: damaged[0], lambda: damaged.read_batch([0, 1])):
        with pytest.raises(ValueError, match=r"a damaged shard: .*`lwm-data check` tells which"):
            read()


def test_another_tokenizer_is_found(dataset: Dataset) -> None:
    spec = Path(dataset.url) / "text_tokenizer.yaml"
    spec.write_text(spec.read_text().replace("bos: 1", "bos: 5"))
    (problem,) = _check(dataset)
    assert "text_tokenizer.yaml" in problem and "not the tokenizer this dataset was built with" in problem
