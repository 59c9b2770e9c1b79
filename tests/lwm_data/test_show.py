"""What a person sees of a dataset is what it holds, and never steers the terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console, RenderableType

from lwm_data.format.dataset import Dataset, open_dataset
from lwm_data.format.example import text_runs
from lwm_data.format.packed import PackedSequence
from lwm_data.format.shard import ShardWriter
from lwm_data.format.vocab import TextTokenizer
from lwm_data.show import row_text, row_view
from lwm_data.sources.record import Record
from lwm_data.summary import dataset_table

CONTROLS = [*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0))]


def _drawn(renderable: RenderableType) -> str:
    file = io.StringIO()
    Console(file=file, width=200, color_system=None).print(renderable)
    return file.getvalue()


@pytest.fixture
def dataset(dataset_of: Callable[..., Dataset], demo_tokenizer: TextTokenizer, tmp_path: Path) -> Dataset:
    """One row, of a text and a key that hold every control character."""
    ids = demo_tokenizer.encode("so \x1b[2J and " + "".join(CONTROLS))
    runs = text_runs(demo_tokenizer, [(ids, True)], eos=True)
    return dataset_of(tmp_path, [Record("key" + "".join(CONTROLS) + "end", runs)], row_length=len(ids) + 5)


def test_no_control_character_of_a_text_or_a_key_reaches_the_terminal(dataset: Dataset) -> None:
    drawn = _drawn(row_text(row_view(dataset, 0)))
    assert [char for char in drawn if char in CONTROLS and char not in "\n\t"] == []
    assert "\u241b[2J" in drawn
    (heading,) = [line for line in drawn.splitlines() if "segment 1" in line]
    assert "end" in heading, "a key is one line"


@pytest.mark.parametrize("name", ["x [/y]", "x [bold]y", "x [link=http://a]y", "x \x1b[2J"])
def test_a_dataset_of_any_name_has_a_table(dataset: Dataset, name: str) -> None:
    drawn = _drawn(dataset_table(dataset.info.model_copy(update={"name": name})))
    assert name.replace("\x1b", "\u241b") in drawn and "\x1b" not in drawn


def test_a_store_whose_package_is_missing_is_told_with_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as where it is not installed
    with pytest.raises(ValueError, match=r"s3://bucket/data: .* not installed: pip install s3fs"):
        open_dataset("s3://bucket/data")


def test_two_writers_of_one_shard_do_not_touch_each_other(tmp_path: Path) -> None:
    """Process numbers do not tell builds in two containers apart; here both are this process."""
    runs = np.array([[8, 1, 0]], np.uint32)
    row = PackedSequence(np.arange(8, dtype=np.uint16), runs, np.ones(1, np.float32))
    path = tmp_path / "shard-000000.tar"
    with ShardWriter(path, 8, np.dtype(np.uint16)) as first:
        first.add(row)
        with ShardWriter(path, 8, np.dtype(np.uint16)) as second:
            second.add(row)
    assert first.sha256 == second.sha256 and [file.name for file in tmp_path.iterdir()] == [path.name]
