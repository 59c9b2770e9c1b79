"""merge, split and subset move rows and nothing else: none is lost, doubled or changed, and every count follows."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lwm_data.build import build
from lwm_data.check import check_dataset
from lwm_data.cli import app
from lwm_data.derived_dataset import Derived, copy_shards
from lwm_data.format import shard as shard_module
from lwm_data.format.dataset import FORMAT_VERSION, Dataset, open_dataset
from lwm_data.format.example import text_runs, vision_runs
from lwm_data.format.packed import PackedSequence
from lwm_data.format.shard import ShardWriter, rows_per_page
from lwm_data.format.vocab import TextTokenizer
from lwm_data.rearrange import merge, split, subset
from lwm_data.row_copy import CopiedRows, CopyFormat, carry_file
from lwm_data.sources.record import Record
from lwm_data.terminal import run_app
from lwm_data.work_folder import WorkFolder

ROW = 600


def _records(tokenizer: TextTokenizer, seed: int, num: int, num_keys: int) -> list[Record]:
    """Texts of random ids, every fifth with an image, under `num_keys` keys."""
    rng = np.random.default_rng(seed)
    records = []
    for i in range(num):
        ids = rng.integers(3, tokenizer.vocab_size, rng.integers(1, 250)).astype(np.int32)
        runs = text_runs(tokenizer, [(ids[:5], False), (ids[5:], True)], eos=True)
        if i % 5 == 4:
            runs += vision_runs(tokenizer, rng.integers(0, 8192, (1, 256)).astype(np.int32), trained=True)
        records.append(Record(f"key{rng.integers(num_keys)}", runs))
    return records


def _rows(dataset: Dataset) -> list[bytes]:
    """Each row as bytes that hold all of it."""
    rows = [dataset.packed(i) for i in range(len(dataset))]
    return [b"|".join(part.astype("<f8").tobytes() for part in (row.tokens, row.runs, row.weights)) for row in rows]


def _examples(folder: Path | str) -> list[tuple[bytes, str, str, int]]:
    """Of each example: the row that it lies in, source, key, part. Read without what is tested."""
    dataset = open_dataset(folder)
    rows, first_row, examples = _rows(dataset), 0, []
    for shard in dataset.info.shards:
        table = pq.read_table(Path(folder) / shard.name.replace(".tar", ".examples.parquet"))
        for line in table.to_pylist():
            examples.append((rows[first_row + line["row"]], line["source"], line["key"], line["part"]))
        first_row += shard.num_rows
    return examples


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _is_right(folder: Path) -> bool:
    assert check_dataset(open_dataset(folder), lambda rows: None) == []
    left = {path.name for path in folder.iterdir() if not path.name.startswith("shard-")}
    return left == {"index.json", "README.md", "rejected.jsonl", "text_tokenizer.yaml", "text_tokenizer.model"}


@settings(max_examples=12)  # each makes five datasets
@given(
    seed=st.integers(0, 99),
    num=st.integers(2, 30),
    num_keys=st.integers(1, 30),
    shares=st.sampled_from([(0.5, 0.5), (0.8, 0.2), (0.3, 0.3, 0.4)]),
    by=st.sampled_from(["row", "document"]),
    packing=st.sampled_from(["masked", "naive"]),
)
def test_each_row_and_each_example_is_in_exactly_one_part_and_merging_the_parts_gives_all_rows_back(
    dataset_of: Callable[..., Dataset],
    demo_tokenizer: TextTokenizer,
    seed: int,
    num: int,
    num_keys: int,
    shares: tuple[float, ...],
    by: str,
    packing: str,
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = dataset_of(folder, _records(demo_tokenizer, seed, num, num_keys), row_length=ROW, packing=packing)
        names = ["a", "b", "c"][: len(shares)]
        try:
            parts = split(whole.url, folder / "parts", shares, names, by=by, seed=seed)
        except ValueError as error:
            assert "would have none of the" in str(error)
            assume(False)
        assert all(_is_right(part.out) for part in parts)
        rows = [row for part in parts for row in _rows(open_dataset(part.out))]
        assert Counter(rows) == Counter(_rows(whole))
        examples = [_examples(part.out) for part in parts]
        assert Counter(line for lines in examples for line in lines) == Counter(_examples(whole.url))
        if by == "document":
            keys = [{(source, key) for _, source, key, _ in lines} for lines in examples]
            assert sum(map(len, keys)) == len(set().union(*keys)), "no record is in two parts"
        for field in ("num_rows", "num_tokens", "num_trained"):
            assert sum(getattr(part.info, field) for part in parts) == getattr(whole.info, field)
        for order in ("keep", "mix"):
            merged = merge([part.out for part in parts], folder / order, order=order)
            assert _is_right(merged.out)
            assert Counter(_rows(open_dataset(merged.out))) == Counter(rows)
            assert order == "mix" or _rows(open_dataset(merged.out)) == rows
            got, wanted = merged.info.sources["made"], whole.info.sources["made"]
            for field in ("examples", "tokens", "vision_tokens", "trained_tokens"):
                assert getattr(got, field) == getattr(wanted, field), field


SOURCES: list[dict[str, Any]] = [
    {"name": "books", "type": "books", "path": "books/*.txt", "overflow": "split"},
    {"name": "chats", "type": "chats", "path": "chats.jsonl", "overflow": "truncate"},
]


@pytest.fixture
def built(project: Callable[..., Path]) -> Path:
    """A built dataset of many shards: books that are split over rows, chats of which some are cut, some rejected."""
    manifest = project("built", row_length=64, shard_size=2048, max_rejected=0.5, sources=SOURCES)
    with open(manifest.parent / "chats.jsonl", "a") as file:
        file.write("no chat\n{}\n" + json.dumps({"id": "long", "data": ["Say.", "on and " * 99]}) + "\n")
    return build(manifest).out


def test_a_subset_of_all_rows_has_the_bytes_of_the_dataset(built: Path, tmp_path: Path) -> None:
    made = subset(built, tmp_path / "all", rows=(0, None))
    before, after = _files(built), _files(made.out)
    assert before.keys() == after.keys() and len(made.info.shards) > 5
    differ = {name for name in before if before[name] != after[name]}
    assert differ == {"index.json", "README.md"}
    assert made.info.fingerprint == open_dataset(built).info.fingerprint
    assert made.info.sources == open_dataset(built).info.sources and made.info.rejected
    assert _is_right(made.out)


def test_a_range_holds_these_rows_and_a_fraction_is_part_of_a_larger_one(built: Path, tmp_path: Path) -> None:
    whole = _rows(open_dataset(built))
    some = subset(built, tmp_path / "some", rows=(5, 40))
    assert _rows(open_dataset(some.out)) == whole[5:40] and _is_right(some.out)
    fifth, half = (subset(built, tmp_path / str(of), fraction=of, seed=1) for of in (0.2, 0.5))
    assert set(_rows(open_dataset(fifth.out))) < set(_rows(open_dataset(half.out)))
    assert abs(half.info.num_rows - len(whole) / 2) < 3 * len(whole) ** 0.5
    both = subset(built, tmp_path / "both", rows=(5, 40), fraction=0.5, seed=1)
    assert set(_rows(open_dataset(both.out))) == set(whole[5:40]) & set(_rows(open_dataset(half.out)))


def test_a_subset_by_source_holds_rows_of_that_source_alone(built: Path, tmp_path: Path) -> None:
    made = subset(built, tmp_path / "chats", sources=["chats"])
    assert _is_right(made.out) and list(made.info.sources) == ["chats"]
    assert {source for _, source, _, _ in _examples(made.out)} == {"chats"}
    mixed = {row for row, source, _, _ in _examples(built) if source == "books"}
    assert len(mixed) + made.info.num_rows == open_dataset(built).info.num_rows
    assert {json.loads(line)["source"] for line in (made.out / "rejected.jsonl").read_text().splitlines()} == {"chats"}
    with pytest.raises(ValueError, match=r"source: got chat; .* has books, chats"):
        subset(built, tmp_path / "none", sources=["chat"])


@pytest.mark.parametrize("by", ["row", "document"])
def test_counts_and_rejected_records_of_the_parts_sum_to_the_whole(built: Path, tmp_path: Path, by: str) -> None:
    whole = open_dataset(built).info
    parts = split(built, tmp_path / "parts", (0.6, 0.4), ("a", "b"), by=by)
    merged = merge([part.out for part in parts], tmp_path / "merged").info
    assert merged.sources == whole.sources and merged.rejected == whole.rejected
    lines = [line for part in parts for line in (part.out / "rejected.jsonl").read_text().splitlines()]
    assert sorted(lines) == sorted((built / "rejected.jsonl").read_text().splitlines())
    cut = [json.loads(line)["key"] for line in lines if json.loads(line)["reason"] == "truncated"]
    assert len(cut) == 1
    for part in parts:  # what was cut is told where it lies
        keys = {key for _, _, key, _ in _examples(part.out)}
        assert (cut[0] in keys) == (cut[0] in (part.out / "rejected.jsonl").read_text())


@pytest.mark.parametrize("by", ["row", "document"])
def test_what_no_share_asked_for_is_counted_once_in_the_last_part(
    project: Callable[..., Path], tmp_path: Path, by: str
) -> None:
    sources = [source | {"share": share} for source, share in zip(SOURCES, (1, 9), strict=True)]
    built = build(project("shared", row_length=64, shard_size=2048, sources=sources)).out
    whole = open_dataset(built).info
    assert whole.sources["books"].left_out > 0 and whole.rejected["split"] > 0
    parts = split(built, tmp_path / "parts", (0.4, 0.3, 0.3), ("a", "b", "c"), by=by)
    merged = merge([part.out for part in parts], tmp_path / "merged").info
    assert merged.sources == whole.sources and merged.rejected == whole.rejected
    assert [part.info.sources["books"].left_out for part in parts] == [0, 0, whole.sources["books"].left_out]
    again = split(parts[2].out, tmp_path / "again", (0.5, 0.5), ("d", "e"))
    merged = merge([part.out for part in again], tmp_path / "merged-again").info
    assert merged.sources == parts[2].info.sources and merged.rejected == parts[2].info.rejected


@pytest.mark.parametrize("same_key", [False, True])
def test_an_example_that_holds_bos_where_a_naive_row_begins_is_counted_once(
    dataset_of: Callable[..., Dataset], demo_tokenizer: TextTokenizer, tmp_path: Path, same_key: bool
) -> None:
    """Examples of 150 tokens with BOS at 100 too, and of 50, in turn: each second row of 100 begins with such a BOS."""
    ids = np.full(148, 9, np.int32)
    ids[99] = demo_tokenizer.bos
    records = []
    for i in range(8):
        runs = text_runs(demo_tokenizer, [(ids[: 148 if i % 2 == 0 else 48], True)], eos=True)
        records.append(Record("k" if same_key else f"k{i}", runs))
    whole = dataset_of(tmp_path, records, row_length=100, packing="naive")
    assert all(whole[row]["tokens"][0] == demo_tokenizer.bos for row in range(8))
    parts = split(whole.url, tmp_path / "parts", (0.5, 0.5), ("a", "b"))
    assert sum(part.info.sources["made"].examples for part in parts) == 8


def test_shares_that_nearly_sum_to_1_leave_no_row_out(built: Path, tmp_path: Path) -> None:
    parts = split(built, tmp_path / "parts", (0.3333,) * 3, ("a", "b", "c"))
    assert sum(part.info.num_rows for part in parts) == open_dataset(built).info.num_rows
    assert parts[0].info.manifest["parts"] == pytest.approx(dict.fromkeys("abc", 1 / 3))


def test_the_index_says_what_was_done_to_which_datasets(built: Path, tmp_path: Path) -> None:
    whole = open_dataset(built).info
    part = split(built, tmp_path / "parts", (0.6, 0.4), ("a", "b"), seed=5)[1].info
    assert part.name == "small-b" and part.manifest["kind"] == "split" and part.manifest["part"] == "b"
    assert part.manifest["parts"] == {"a": 0.6, "b": 0.4} and part.manifest["seed"] == 5
    (origin,) = part.manifest["datasets"]
    assert origin["fingerprint"] == whole.fingerprint and origin["manifest"] == whole.manifest
    merged = merge([tmp_path / "parts" / "a", tmp_path / "parts" / "b"], tmp_path / "merged", name="again").info
    assert merged.name == "again" and [of["name"] for of in merged.manifest["datasets"]] == ["small-a", "small-b"]
    assert len({whole.build_fingerprint, part.build_fingerprint, merged.build_fingerprint}) == 3


def _edit_index(folder: Path, **keys: Any) -> None:
    index = json.loads((folder / "index.json").read_text()) | keys
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"row_length": 128}, "row_length: 64 and 128"),
        ({"packing": "naive"}, "packing: masked and naive"),
        ({"loss_weighting": "token"}, "loss_weighting: example and token"),
        ({"row_length": 80, "packing": "naive"}, "row_length: 64 and 80; packing: masked and naive"),
    ],
)
def test_datasets_that_differ_are_not_merged_and_the_difference_is_named(
    built: Path, project: Callable[..., Path], tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    other = build(project("other", **({"row_length": 64, "sources": SOURCES} | keys))).out
    with pytest.raises(ValueError, match=f"{built} and {other} differ in {message}; build one of them again"):
        merge([built, other], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_datasets_of_two_tokenizers_are_not_merged(built: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(built, other)
    _edit_index(other, tokenizer_fingerprint="0" * 64)
    with pytest.raises(ValueError, match="differ in tokenizer_fingerprint"):
        merge([built, other], tmp_path / "merged")
    _edit_index(other, tokenizer_fingerprint=open_dataset(built).info.tokenizer_fingerprint)
    for folder, weights in ((built, b"a"), (other, b"b")):
        (folder / "vision_tokenizer.yaml").write_bytes(b"name: x")
        (folder / "vision_tokenizer.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"other/vision_tokenizer\.safetensors: not the file .*built"):
        merge([built, other], tmp_path / "merged")
    (other / "vision_tokenizer.safetensors").write_bytes(b"a")
    merged = merge([built, other], tmp_path / "merged").out
    assert (merged / "vision_tokenizer.safetensors").read_bytes() == b"a"
    assert subset(merged, tmp_path / "some", rows=(0, 3)).made
    assert (tmp_path / "some" / "vision_tokenizer.yaml").read_bytes() == b"name: x"


def _rewrite(folder: Path, dtype: str, change: Callable[[PackedSequence], PackedSequence] = lambda row: row) -> None:
    """The same rows with ids of `dtype`, each changed."""
    dataset = open_dataset(folder)
    shards, row = [], 0
    for shard in dataset.info.shards:
        rows = [dataset.packed(i) for i in range(row, row + shard.num_rows)]
        row += shard.num_rows
        with ShardWriter(folder / shard.name, 64, np.dtype(dtype)) as writer:
            for packed in rows:
                writer.add(change(packed))
        sizes = {"num_bytes": writer.num_bytes, "sha256": writer.sha256, "offsets_at": writer.offsets_at}
        shards.append(asdict(shard) | sizes)
    _edit_index(folder, shards=shards, dtype=dtype, rows_per_page=rows_per_page(64, np.dtype(dtype)))


def _begin_with_a_run_of_one(row: PackedSequence) -> PackedSequence:
    """The row as version 1 had it: the first token of a segment lies in a run of weight 0."""
    runs, weights, before = [], [], 0
    for (length, segment, vision), weight in zip(row.runs.tolist(), row.weights.tolist(), strict=True):
        if segment != before and weight:
            runs.append((1, segment, vision))
            weights.append(0.0)
            length -= 1
        if length:
            runs.append((length, segment, vision))
            weights.append(weight)
        before = segment
    return PackedSequence(row.tokens, np.array(runs, np.uint32), np.array(weights, np.float32))


def test_what_is_made_of_a_dataset_of_version_1_is_of_the_last_version(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, rows = tmp_path / "old", _rows(open_dataset(built))
    shutil.copytree(built, old)
    with monkeypatch.context() as patched:
        patched.setattr(shard_module, "FORMAT_VERSION", 1)
        _rewrite(old, "uint16", _begin_with_a_run_of_one)
    _edit_index(old, format_version=1)
    assert check_dataset(open_dataset(old), lambda rows: None) == [] and _rows(open_dataset(old)) != rows
    merged, some = merge([old, built], tmp_path / "merged"), subset(old, tmp_path / "some", rows=(0, 3))
    for made, wanted in ((merged, 2 * rows), (some, rows[:3])):
        assert made.info.format_version == FORMAT_VERSION and _is_right(made.out)
        assert _rows(open_dataset(made.out)) == wanted
    assert (merged.out / merged.info.shards[0].name).read_bytes() == (built / merged.info.shards[0].name).read_bytes()


@pytest.mark.parametrize("order", ["keep", "mix"])
def test_ids_of_two_widths_become_wide(built: Path, tmp_path: Path, order: str) -> None:
    wide = tmp_path / "wide"
    shutil.copytree(built, wide)
    _rewrite(wide, "uint32")
    rows = _rows(open_dataset(built))
    merged = merge([built, wide], tmp_path / "merged", order=order)
    assert merged.info.dtype == "uint32" and _is_right(merged.out)
    assert sorted(_rows(open_dataset(merged.out))) == sorted(2 * rows)
    assert order == "mix" or _rows(open_dataset(merged.out)) == 2 * rows
    if order == "keep":
        copy = (merged.out / merged.info.shards[0].name).read_bytes()
        assert copy == (wide / open_dataset(wide).info.shards[0].name).read_bytes()


def test_merged_shards_are_links_that_outlive_their_datasets(built: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(built, other)
    linked, copied = merge([built, other], tmp_path / "linked"), merge([built, other], tmp_path / "copied", link=False)
    assert _files(linked.out) == _files(copied.out)
    name = linked.info.shards[-1].name
    assert (linked.out / name).stat().st_nlink == 2 and (copied.out / name).stat().st_nlink == 1
    shutil.rmtree(other)
    shutil.rmtree(built)
    assert _is_right(linked.out) and _is_right(copied.out)


def test_a_file_that_is_carried_again_by_link_leaves_no_other_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    for _ in range(2):
        carry_file(str(tmp_path / "a"), tmp_path / "b", link=True)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"] and (tmp_path / "b").samefile(tmp_path / "a")


def test_shards_above_a_million_stay_in_the_order_of_their_numbers(built: Path, tmp_path: Path) -> None:
    source = open_dataset(built)
    numbers = [999_998, 999_999, 1_000_000, 1_000_001]
    units = [CopiedRows(f"shard-{n:06d}.tar", np.zeros(1, np.int64), np.array([i])) for i, n in enumerate(numbers)]
    form = CopyFormat(tmp_path / "out", ((source.url, source.info),), source.info.dtype, 1, 2)
    with WorkFolder(form.out) as work:
        records = copy_shards(work, form, units, len(units), workers=1)
    assert [record.shard.name for record in records] == [unit.name for unit in units]


def test_names_that_collide_are_summed(built: Path, tmp_path: Path) -> None:
    other = subset(built, tmp_path / "other", rows=(0, 20))
    merged = merge([built, other.out], tmp_path / "merged").info
    for name, of in merged.sources.items():
        for field in type(of).model_fields.keys() - {"reasons"}:
            sum_of_both = getattr(open_dataset(built).info.sources[name], field) + getattr(
                other.info.sources[name], field
            )
            assert getattr(of, field) == sum_of_both


def test_the_same_bytes_with_more_workers_and_from_a_url(built: Path, tmp_path: Path) -> None:
    one, two, far = (
        subset(f"{prefix}{built}", tmp_path / f"some{i}", fraction=0.8, workers=workers).out
        for i, (prefix, workers) in enumerate((("", 1), ("", 2), ("file://", 1)))
    )
    assert _files(one) == _files(two) == _files(far)
    near, afar = (
        merge([f"{prefix}{one}", f"{prefix}{built}"], tmp_path / f"merged{i}").out
        for i, prefix in enumerate(("", "file://"))
    )
    assert _files(near) == _files(afar)


KILLED = {
    "merge": (["merge", "IN", "IN", "--order", "mix", "--out", "OUT"], "OUT"),
    "carry": (["merge", *["IN"] * 20, "--copy", "--out", "OUT"], "OUT"),
    "link": (["merge", *["IN"] * 40, "--out", "OUT"], "OUT"),
    "split": (["split", "IN", "--parts", "0.1,0.9", "--names", "a,b", "--out", "OUT"], "OUT/b"),
    "subset": (["subset", "IN", "--fraction", "0.95", "--out", "OUT"], "OUT"),
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Bytecode is kept between the processes of this file: compiling it is most of what a short verb does."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("bytecode"))}


@pytest.mark.parametrize("verb", KILLED)
def test_killed_and_run_again_it_leaves_no_dataset_and_then_the_same_bytes(
    built: Path, tmp_path: Path, environment: dict[str, str], verb: str
) -> None:
    args, folder = KILLED[verb]

    def command(out: Path) -> list[str]:
        return [arg.replace("IN", str(built)).replace("OUT", str(out)) for arg in args]

    def where(out: Path) -> Path:
        return Path(folder.replace("OUT", str(out)))

    assert run_app(app, command(tmp_path / "whole")) == 0
    wanted = _files(where(tmp_path / "whole"))
    num_shards = sum(name.endswith(".tar") for name in wanted)
    halfway = 0
    for kill in range(2):
        out = tmp_path / f"killed{kill}"
        process = subprocess.Popen(
            [sys.executable, "-m", "lwm_data.cli", *command(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parents[2],
            env=environment,
        )
        while len(list(where(out).glob("shard-*.tar"))) < 1 + kill * num_shards // 2 and process.poll() is None:
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        if not (where(out) / "index.json").exists():
            halfway += 1
            with pytest.raises(ValueError, match="not a dataset"):
                open_dataset(where(out))
        assert run_app(app, command(out)) == 0
        assert _files(where(out)) == wanted, f"kill {kill}"
    assert halfway, "the kills hit it at work"


def test_a_finished_one_has_nothing_to_do_and_other_options_replace_it(built: Path, tmp_path: Path) -> None:
    out = tmp_path / "some"
    assert subset(built, out, rows=(0, 70)).made
    first = _files(out)
    assert not subset(built, out, rows=(0, 70)).made
    next(out.glob("shard-*.tar")).unlink()
    assert subset(built, out, rows=(0, 70)).made and _files(out) == first
    (out / "vision_tokenizer.yaml").write_text("of an earlier dataset")
    assert subset(built, out, rows=(0, 10)).made
    assert len(list(out.glob("shard-*.tar"))) == 1 and _is_right(out)


def test_a_folder_that_is_not_ours_or_is_read_is_left_alone(built: Path, tmp_path: Path) -> None:
    before = _files(built)
    with pytest.raises(ValueError, match=r"out: got .*: it is one of the datasets that are read"):
        merge([built, built], built)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("1")
    with pytest.raises(ValueError, match="not empty and no dataset"):
        subset(built, tmp_path / "thesis", rows=(0, 1))
    assert _files(built) == before and os.listdir(tmp_path / "thesis") == ["chapter.txt"]


@pytest.mark.parametrize("read", ["{}", "file://{}", "local://{}", "{}/../link"])
def test_a_dataset_that_is_read_is_not_written_to_however_it_is_called(built: Path, tmp_path: Path, read: str) -> None:
    (built.parent / "link").symlink_to(built)
    before = _files(built)
    source = read.format(built)
    for out in (built, built.parent / "link", built / "parts" / "new"):
        for verb in (
            lambda: subset(source, out, rows=(0, 1), name="small"),  # noqa: B023 (called at once)
            lambda: merge([source, source], out),  # noqa: B023
            lambda: split(source, out / "..", (0.5, 0.5), (out.name, "b")),  # noqa: B023
        ):
            with pytest.raises(
                ValueError, match=r"out: got .*: it is one of the datasets that are read, or lies in one"
            ):
                verb()
    assert _files(built) == before


def test_a_dataset_of_another_kind_or_name_is_not_replaced(built: Path, tmp_path: Path) -> None:
    some = subset(built, tmp_path / "some", rows=(0, 9))
    other = build(built.parent / "dataset.yaml", [f"out={tmp_path / 'other'}"]).out
    before = {folder: _files(folder) for folder in (some.out, other)}
    cases: list[tuple[Path, Callable[[Path], Derived], str]] = [
        (other, lambda out: subset(built, out, rows=(0, 2)), "the dataset small stands there, which the subset"),
        (
            some.out,
            lambda out: merge([built, built], out),
            "the subset small-subset stands there, which the merge small",
        ),
        (some.out, lambda out: subset(built, out, rows=(0, 2), name="few"), "which the subset few would replace"),
    ]
    for out, verb, message in cases:
        with pytest.raises(ValueError, match=f"out: got {out}: .*{message}.*name another folder, or remove that one"):
            verb(out)
    assert before == {folder: _files(folder) for folder in before}
    assert subset(built, some.out, rows=(0, 2)).made and _is_right(some.out)


def test_a_damaged_shard_is_refused_where_its_rows_are_copied_and_kept_as_it_is_where_it_is_carried(
    built: Path, tmp_path: Path
) -> None:
    """A copy has a hash of its own; damage must not be made good by it."""
    old = subset(built, tmp_path / "some", rows=(0, 10)).out
    before = _files(old)
    damaged = bytearray((built / "shard-000001.tar").read_bytes())
    damaged[700] ^= 1
    (built / "shard-000001.tar").write_bytes(damaged)
    for verb in (
        lambda: subset(built, old, fraction=0.9),
        lambda: split(built, tmp_path / "parts", (0.5, 0.5), ("a", "b")),
        lambda: merge([old, built], tmp_path / "mixed", order="mix"),
    ):
        with pytest.raises(ValueError, match=r"shard-000001\.tar: its sha256 is not the index's"):
            verb()
    assert _files(old) == before and not (tmp_path / "parts").exists() and not (tmp_path / "mixed").exists()
    assert subset(built, tmp_path / "healthy", rows=(0, 10)).made, "only shards that are read are looked at"
    problems = check_dataset(open_dataset(merge([old, built], tmp_path / "kept").out), lambda rows: None)
    assert problems and "sha256" in problems[0]


def _fails(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert run_app(app, [str(arg) for arg in args]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error[error.index("lwm-data: error: ") :]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["merge", "{}"], "merge: got 1 dataset; wanted two or more"),
        (["merge", "{}", "{}", "--order", "random"], "order: got random; wanted keep or mix"),
        (["split", "{}", "--parts", "0.9,0.2"], "parts: got 0.9,0.2; wanted two or more shares that sum to 1"),
        (["split", "{}", "--parts", "nan,0.5"], "parts: got nan,0.5; wanted two or more shares that sum to 1"),
        (["split", "{}", "--parts", "0.5,nan"], "parts: got 0.5,nan; wanted two or more shares that sum to 1"),
        (["split", "{}", "--parts", "most,few"], "--parts: got most,few; wanted numbers like 0.9,0.1"),
        (["split", "{}", "--names", "a"], "names: got 1 for 2 parts; wanted one for each"),
        (["split", "{}", "--names", "a,../b"], "names: got a,../b; wanted different names of letters"),
        (["split", "{}", "--by", "book"], "by: got book; wanted row or document"),
        (["split", "{}", "--parts", "0.999999,0.000001"], "split: part valid (share 1e-06) would have none of the"),
        (["subset", "{}"], "subset: no condition given; name --rows, --fraction or --source"),
        (["subset", "{}", "--rows", "5"], "--rows: got 5; wanted FROM:TO"),
        (["subset", "{}", "--rows", "5:9999"], "rows: got 5:9999; the dataset has rows 0:"),
        (["subset", "{}", "--fraction", "1.5"], "fraction: got 1.5; wanted more than 0 and at most 1"),
        (["subset", "{}", "--fraction", "1e-9"], "is taken; ask for more"),
    ],
)
def test_wrong_input_is_told_and_leaves_nothing(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: Sequence[str], message: str
) -> None:
    out = tmp_path / "new"
    assert message in _fails(capsys, *(arg.replace("{}", str(built)) for arg in args), "--out", out)
    assert not out.exists()


def test_the_verbs_tell_a_person_and_a_script_what_they_made(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = tmp_path / "parts"
    command = ["split", str(built), "--parts", "0.8,0.2", "--out", str(parts)]
    assert run_app(app, command) == 0
    said = capsys.readouterr().out
    assert "% of all (asked for 80.00%), and " in said and "parts/valid: " in said
    assert run_app(app, [*command, "--json"]) == 0
    described = json.loads(capsys.readouterr().out)["parts"]
    assert [of["made"] for of in described] == [False, False]
    assert sum(of["num_rows"] for of in described) == open_dataset(built).info.num_rows
    merged = tmp_path / "merged"
    command = ["merge", str(parts / "train"), str(parts / "valid"), "--order", "mix", "--out", str(merged)]
    assert run_app(app, command) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("made: ") and Path(said.removeprefix("made: ")).resolve() == merged
    assert run_app(app, [*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["made"] is False
