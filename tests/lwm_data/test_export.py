"""What is exported is what the dataset holds, read by programs that do not know our shards; the docs' PyTorch loop."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import zstandard

from lwm_data import export
from lwm_data.build import build
from lwm_data.cli import app
from lwm_data.export import export_dataset
from lwm_data.format.dataset import Dataset, open_dataset
from lwm_data.format.example import text_runs, vision_runs
from lwm_data.format.vocab import TextTokenizer
from lwm_data.sources.record import Record
from lwm_data.terminal import run_app
from tests.test_docs import ROOT, fenced, shell_lines

NAMES = ("tokens", "vision_mask", "segment_ids", "position_ids", "loss_weights")
PAGE = (ROOT / "docs" / "rearrange.md").read_text()
ROW = 400


@pytest.fixture(scope="module")
def mixed(
    dataset_of: Callable[..., Dataset], demo_tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Dataset:
    """Rows of 400 in shards of 3: texts, every third with an image between two sentences."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(30):
        runs = text_runs(demo_tokenizer, [(demo_tokenizer.encode(f"Sentence number {i}, and so on."), True)], eos=False)
        if i % 3 == 0:
            runs += vision_runs(demo_tokenizer, rng.integers(0, 8192, (1, 256)).astype(np.int32), trained=True)
            runs += text_runs(demo_tokenizer, [(demo_tokenizer.encode("An image."), False)], eos=True)[1:]
        records.append(Record(f"key{i}", runs))
    dataset = dataset_of(tmp_path_factory.mktemp("mixed"), records, row_length=ROW)
    assert len(dataset) > 8 and len(dataset.info.shards) > 2
    return dataset


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of four rows, row groups of two."""
    monkeypatch.setattr(export, "FILE_TOKENS", 4 * ROW)
    monkeypatch.setattr(export, "GROUP_TOKENS", 2 * ROW)


def _assert_equal(rows: list[dict[str, Any]], dataset: Dataset, first_row: int) -> None:
    for i, row in enumerate(rows):
        for name in NAMES:
            np.testing.assert_array_equal(row[name], dataset[first_row + i][name], err_msg=name)  # type: ignore[literal-required]


@pytest.mark.filterwarnings("ignore")
def test_datasets_reads_the_same_arrays_from_parquet(mixed: Dataset, small_files: None, tmp_path: Path) -> None:
    import datasets

    made = export_dataset(mixed.url, tmp_path / "hf", "hf", (1, None))
    assert next(iter(made.files)) == "rows-00000-of-00003.parquet" and len(made.files) == 3
    for source in ({"path": str(made.out)}, {"path": "parquet", "data_files": f"{made.out}/*.parquet"}):
        rows = datasets.load_dataset(**source, split="train", cache_dir=str(tmp_path / "cache"))
        kinds = {name: (feature.feature.dtype, feature.length) for name, feature in rows.features.items()}
        wanted = dict(zip(NAMES, ("int32", "bool", "int32", "int32", "float32"), strict=True))
        assert kinds == {name: (dtype, ROW) for name, dtype in wanted.items()}
        assert len(rows) == len(mixed) - 1 == made.num_rows
        _assert_equal(list(rows), mixed, 1)
    table = pq.ParquetFile(made.out / "rows-00000-of-00003.parquet")
    assert table.num_row_groups == 2, "a reader need not hold a file"


def test_numpy_alone_reads_the_same_arrays_from_npz(mixed: Dataset, small_files: None, tmp_path: Path) -> None:
    made = export_dataset(mixed.url, tmp_path / "npz", "npz")
    row = 0
    for name in made.files:
        with np.load(made.out / name, allow_pickle=False) as arrays:
            held = {array: arrays[array] for array in NAMES}
        for array, of in held.items():
            assert of.dtype == mixed[0][array].dtype and of.shape[1] == ROW  # type: ignore[literal-required]
        num = len(held["tokens"])
        _assert_equal([{array: held[array][i] for array in NAMES} for i in range(num)], mixed, row)
        row += num
    assert row == len(mixed)


@pytest.mark.parametrize("to", ["jsonl", "jsonl.zst"])
def test_a_line_holds_an_example_with_its_text(mixed: Dataset, small_files: None, tmp_path: Path, to: str) -> None:
    made = export_dataset(mixed.url, tmp_path / "out", to, (2, 7))
    data = b""
    for name in made.files:
        raw = (made.out / name).read_bytes()
        data += zstandard.ZstdDecompressor().stream_reader(io.BytesIO(raw)).read() if to == "jsonl.zst" else raw
    lines = [json.loads(line) for line in data.decode().splitlines()]
    assert sorted({line["row"] for line in lines}) == [2, 3, 4, 5, 6]
    for line in lines:
        row = mixed[line["row"]]
        at = row["segment_ids"] == line["segment"]
        assert line["tokens"] == row["tokens"][at].tolist()
        assert line["vision_mask"] == row["vision_mask"][at].astype(int).tolist()
        np.testing.assert_array_equal(np.array(line["loss_weights"], np.float32), row["loss_weights"][at])
        number = int(line["key"].removeprefix("key"))
        assert line["source"] == "made" and line["text"].startswith(f"Sentence number {number}, and so on.")
        if number % 3 == 0:
            codes = [str(id) for id, is_vision in zip(line["tokens"], line["vision_mask"], strict=True) if is_vision]
            assert codes.pop() == "8193"
            assert line["text"].endswith(f"<vision> {' '.join(codes)} EOV </vision> An image.")


def test_a_naive_row_has_a_line_per_piece(
    dataset_of: Callable[..., Dataset], demo_tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    runs = text_runs(demo_tokenizer, [(np.arange(3, 80, dtype=np.int32), True)], eos=True)
    naive = dataset_of(tmp_path, [Record(f"key{i}", runs) for i in range(4)], row_length=100, packing="naive")
    made = export_dataset(naive.url, tmp_path / "lines", "jsonl")
    lines = [json.loads(line) for line in (made.out / next(iter(made.files))).read_text().splitlines()]
    whole = [int(id) for run in runs for id in run.tokens]
    for i in range(4):
        assert [id for line in lines if line["key"] == f"key{i}" for id in line["tokens"]] == whole
    assert len(lines) == 7, "three examples are cut once"


@pytest.mark.parametrize("to", list(export.FORMATS))
def test_an_export_is_made_once_and_its_bytes_are_those_of_the_rows(mixed: Dataset, tmp_path: Path, to: str) -> None:
    out = tmp_path / "out"
    assert export_dataset(mixed.url, out, to).made
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {"text_tokenizer.model", "text_tokenizer.yaml", "README.md"} <= first.keys()
    assert not export_dataset(mixed.url, out, to).made
    assert export_dataset(mixed.url, out, to, (0, 2)).made
    made = export_dataset(mixed.url, out, to)
    (out / next(iter(made.files))).write_bytes(b"")
    assert made.made and export_dataset(mixed.url, out, to).made
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    assert export_dataset(f"file://{mixed.url}", tmp_path / "far", to).made
    assert {path.name: path.read_bytes() for path in (tmp_path / "far").iterdir()} == first
    assert sorted(os.listdir(tmp_path)) == ["far", "out"]


def test_a_folder_that_holds_something_else_is_left_alone(
    mixed: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("1")
    for out, args, message in (
        (tmp_path, ["--to", "npz"], "it holds something else (thesis.txt); wanted a folder, new, empty or of an "),
        (Path(mixed.url), ["--to", "npz"], "it holds something else"),
        (tmp_path / "new", ["--to", "csv"], "to: got csv; wanted hf or npz or jsonl or jsonl.zst"),
        (tmp_path / "new", ["--to", "npz", "--rows", "3:2"], "rows: got 3:2; the dataset has rows 0:"),
    ):
        assert run_app(app, ["export", mixed.url, *args, "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["thesis.txt"]
    assert run_app(app, ["export", mixed.url, "--to", "npz", "--out", str(tmp_path / "new"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == len(mixed)


def test_what_a_person_puts_into_an_export_is_never_removed(mixed: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_dataset(mixed.url, out, "npz")
    before = set(os.listdir(out))
    for name in ("rows-00000-of-00001.jsonl", "notes", "thesis.txt"):
        (out / name).mkdir() if name == "notes" else (out / name).write_text("1")
        with pytest.raises(ValueError, match=rf"holds something else \({name}\).* move what is not of the export"):
            export_dataset(mixed.url, out, "npz", (0, 2))
        assert set(os.listdir(out)) == before | {name}
        (out / name).rmdir() if name == "notes" else (out / name).unlink()
    (out / "text_tokenizer.yaml").unlink()
    assert export_dataset(mixed.url, out, "npz").made and set(os.listdir(out)) == before
    (tmp_path / "link").symlink_to(out)
    assert export_dataset(mixed.url, tmp_path / "link", "jsonl").made
    assert (tmp_path / "link").is_symlink() and sorted(os.listdir(tmp_path)) == ["link", "out"]
    assert sorted(before - set(os.listdir(out))) == ["rows-00000-of-00001.npz"]


def test_what_comes_while_an_export_writes_is_not_removed(
    mixed: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export_dataset(mixed.url, out, "npz")
    write = export._card
    monkeypatch.setattr(export, "_card", lambda *args: (out / "thesis.txt").write_text("1") and write(*args))
    with pytest.raises(ValueError, match=r"holds something else \(thesis\.txt\)"):
        export_dataset(mixed.url, out, "npz", (0, 2))
    assert (out / "thesis.txt").exists() and (out / export.MARKER).exists() and os.listdir(tmp_path) == ["out"]


MARKERS = ["{}", "[]", "null", "", '{"fingerprint": "", "files": [], "beside": []}', '{"files": {"a": 1}}', "\xff"]


@pytest.mark.parametrize("said", MARKERS)
def test_a_marker_that_is_none_is_something_else(mixed: Dataset, tmp_path: Path, said: str) -> None:
    (tmp_path / export.MARKER).write_text(said, encoding="latin-1")
    with pytest.raises(ValueError, match="it holds something else"):
        export_dataset(mixed.url, tmp_path, "npz")
    assert os.listdir(tmp_path) == [export.MARKER]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to", list(export.FORMATS))
def test_the_code_of_the_readme_reads_every_file(
    mixed: Dataset, small_files: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    made = export_dataset(mixed.url, tmp_path / "out", to)
    assert len(made.files) > 2
    monkeypatch.chdir(made.out)
    (code,) = fenced((made.out / "README.md").read_text(), "python")
    found: dict[str, Any] = {}
    exec(code, found)
    if to == "hf":
        assert len(found["rows"]) == len(mixed)
        return
    assert found["name"] == list(made.files)[-1]  # the last of the loop
    if to == "npz":
        np.testing.assert_array_equal(found["tokens"][-1], mixed[len(mixed) - 1]["tokens"])
    else:
        assert found["examples"][-1]["row"] == len(mixed) - 1


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_export_leaves_no_folder_and_the_next_one_is_whole(
    project: Callable[..., Path], tmp_path: Path, by: signal.Signals
) -> None:
    needles = {"name": "n", "type": "needles", "count": 4000, "haystack": "books/*.txt"}
    sources = [needles | {"tokens": {"min": 150, "max": 250}}]
    dataset = build(project(sources=sources, shard_size="1MB")).out
    out = tmp_path / "exports" / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "lwm_data.cli", "export", str(dataset), "--to", "jsonl", "--out", str(out)],
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    begun = out.with_name(".out.export") / "rows-00000-of-00001.jsonl"
    while not (begun.exists() and begun.stat().st_size) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(by)
    assert process.wait(30) == (130 if by == signal.SIGINT else -signal.SIGKILL)
    assert not out.exists() and (by == signal.SIGKILL or os.listdir(out.parent) == [])
    made = export_dataset(dataset, out, "jsonl")
    assert made.num_rows == open_dataset(dataset).info.num_rows and os.listdir(out.parent) == ["out"]


@pytest.fixture
def demo(project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """A small dataset where the docs have theirs, from the folder that one then stands in."""
    sources = [
        {"name": "novels", "type": "books", "path": "books/*.txt"},
        {"name": "talk", "type": "chats", "path": "chats.jsonl"},
    ]
    manifest = project(out="runs/demo/dataset", row_length=256, shard_size=16384, sources=sources)
    out = build(manifest).out
    monkeypatch.chdir(manifest.parent)
    return open_dataset(out)


@pytest.mark.filterwarnings("ignore")
def test_the_commands_of_the_page_do_what_it_says_and_its_code_reads_what_they_export(
    demo: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    num_rows = len(demo)
    for line in shell_lines(PAGE):
        name, *args = shlex.split(line)
        # The page's numbers are the demo's; this dataset has fewer rows, and its books hang together.
        args = [{"0:200": "0:20", "0:100": "0:10", "document": "row"}.get(arg, arg) for arg in args]
        assert name == "lwm-data" and run_app(app, args) == 0, (line, capsys.readouterr().err)
    assert len(open_dataset("runs/demo/merged")) == len(open_dataset("runs/demo/mixed")) == num_rows
    (code,) = [code for code in fenced(PAGE, "python") if "import datasets" in code]
    found: dict[str, Any] = {}
    exec(code, found)
    np.testing.assert_array_equal(found["tokens_of_the_first_row"].numpy(), demo[0]["tokens"])
    np.testing.assert_array_equal(found["loss_weights"][3], demo[3]["loss_weights"])
    assert found["examples"][0]["text"] and max(line["row"] for line in found["examples"]) == 9


def test_the_pages_pytorch_loop_learns_and_no_example_sees_another(demo: Dataset) -> None:
    import torch

    torch.manual_seed(0)
    (code,) = [code for code in fenced(PAGE, "python") if "import torch" in code]
    found: dict[str, Any] = {}
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would spin while they wait for a processor that others have
    exec(code, found)
    torch.set_num_threads(num_threads)
    losses, rows = found["losses"], found["rows"]
    assert len(losses) == 20 and np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.5
    batch, logs = found["batch"], found["logits"].detach().double().log_softmax(-1)
    by_hand = [
        (float(batch["loss_weights"][row, at]), float(logs[row, at - 1, batch["tokens"][row, at]]))
        for row in range(2)
        for at in range(1, 256)
    ]
    mean = -sum(weight * log for weight, log in by_hand) / sum(weight for weight, _ in by_hand)
    assert abs(mean - losses[-1]) < 1e-4 and not batch["vision_mask"].any()
    found["layers"].eval()
    row = next(i for i in range(len(rows)) if rows[i]["segment_ids"].max() >= 3)
    ids, segments, places = (torch.tensor(rows[row][name][None]) for name in ("tokens", "segment_ids", "position_ids"))
    at = int((segments[0] == 2).nonzero()[1])
    with torch.no_grad():
        before = found["predict"](ids, segments, places)[0]
        ids[0, at] = 5 if ids[0, at] != 5 else 6
        moved = (found["predict"](ids, segments, places)[0] - before).abs().amax(-1) > 1e-5
    is_later = (segments[0] == 2) & (torch.arange(256) >= at)
    assert moved[at] and not moved[~is_later].any()
