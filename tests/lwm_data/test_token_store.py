"""The token store gives back what was written, and lengths without tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lwm_data import token_store
from lwm_data.format.example import Run
from lwm_data.sources.record import Record, Rejection
from lwm_data.token_store import StoreFile, write_store


def _records() -> list[Record | Rejection]:
    rng = np.random.default_rng(3)
    found: list[Record | Rejection] = [Rejection("first", "empty", "0 bytes")]
    for i in range(40):
        runs = [
            Run(rng.integers(0, 8194, rng.integers(1, 30)).astype(np.int32), bool(rng.integers(2)), bool(j and i % 2))
            for j in range(rng.integers(1, 5))
        ]
        found.append(Record(f"key{i}", tuple(runs)))
        if i % 9 == 0:
            found.append(Rejection(f"bad{i}", "not a chat", "ü: no data"))
    return found


@pytest.mark.parametrize("batch_tokens", [1, 100, 1 << 22])
def test_what_is_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_tokens: int) -> None:
    monkeypatch.setattr(token_store, "BATCH_TOKENS", batch_tokens)
    records = _records()
    write_store(tmp_path / "a.arrow", records)
    store = StoreFile(tmp_path / "a.arrow")
    assert len(store) == len(records)
    assert store.rejections() == [record for record in records if isinstance(record, Rejection)]
    lengths = [sum(len(run.tokens) for run in r.runs) if isinstance(r, Record) else 0 for r in records]
    assert store.lengths().tolist() == lengths
    for i, record in enumerate(records):
        assert store.key(i) == record.key
        if isinstance(record, Record):
            got = store.record(i)
            assert got.key == record.key
            for run, wanted in zip(got.runs, record.runs, strict=True):
                np.testing.assert_array_equal(run.tokens, wanted.tokens)
                assert run.tokens.dtype == np.int32
                assert (run.is_vision, run.trained) == (wanted.is_vision, wanted.trained)
    assert [path.name for path in tmp_path.iterdir()] == ["a.arrow"]


def test_an_empty_unit_has_an_empty_store(tmp_path: Path) -> None:
    write_store(tmp_path / "a.arrow", [])
    assert len(StoreFile(tmp_path / "a.arrow")) == 0 and StoreFile(tmp_path / "a.arrow").lengths().tolist() == []


def test_a_store_file_cut_short_is_refused_with_its_name(tmp_path: Path) -> None:
    write_store(tmp_path / "a.arrow", _records())
    whole = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.arrow: damaged token store file"):
        StoreFile(tmp_path / "a.arrow")


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> object:
        yield _records()[1]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_store(tmp_path / "a.arrow", failing())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
