"""Rows of a dataset for programs that do not know our shards.

hf          rows-00000-of-00004.parquet    a line per row, the five arrays as lists of fixed length
npz         rows-00000-of-00004.npz        the five arrays, each [rows, row_length]
jsonl       rows-00000-of-00004.jsonl      a line per example: source, key, text, tokens, vision mask, weights
jsonl.zst   the same, compressed

Beside them the tokenizers, README.md, and `.lwm-export`, which says what was exported and names the files: no other is
ever removed. All is written to a folder of another name that becomes `out` at the end, so a killed export leaves none.
What is in memory at a time is a file's rows: FILE_TOKENS tokens, or one row.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from pydantic import BaseModel

from lwm_data.derived_dataset import tokenizer_files
from lwm_data.format.dataset import Dataset, open_dataset
from lwm_data.format.vocab import EOF, EOV, TextTokenizer
from lwm_data.rearrange import row_range
from lwm_data.row_copy import carry_file, read_examples
from lwm_data.terminal import Progress

VERSION = 2  # raise it when the same rows give other files
FILE_TOKENS = 1 << 23
GROUP_TOKENS = 1 << 20  # of a Parquet row group
MARKER = ".lwm-export"  # hidden: `datasets` takes each visible .json for data
DTYPES = {
    "tokens": np.dtype("<i4"),
    "vision_mask": np.dtype(bool),
    "segment_ids": np.dtype("<i4"),
    "position_ids": np.dtype("<i4"),
    "loss_weights": np.dtype("<f4"),
}
FORMATS = {"hf": "parquet", "npz": "npz", "jsonl": "jsonl", "jsonl.zst": "jsonl.zst"}  # and their files' endings


@dataclass(frozen=True)
class Exported:
    """Where the files are, their names and bytes, the rows in them, and whether anything had to be done."""

    out: Path
    files: dict[str, int]
    num_rows: int
    made: bool


class _Marker(BaseModel):
    """What `.lwm-export` says, of which this is read again. files: that hold rows, with their bytes; beside: others."""

    fingerprint: str
    files: dict[str, int]
    beside: list[str]


def export_dataset(
    dataset: str | Path, out: str | Path, to: str, rows: tuple[int | None, int | None] | None = None
) -> Exported:
    """Write rows (from, up to but without; all by default) of `dataset` to the folder `out`.

    ValueError for a range or a format that is not there, and for a folder that holds anything but an earlier export.
    """
    if to not in FORMATS:
        raise ValueError(f"to: got {to}; wanted {' or '.join(FORMATS)}")
    source, out = open_dataset(dataset), Path(out)
    start, stop = row_range(rows, source.info.num_rows)
    described: dict[str, Any] = {"dataset": source.info.name, "dataset_fingerprint": source.info.fingerprint, "to": to}
    described |= {"first_row": start, "num_rows": stop - start}
    parts = [VERSION, described, source.info.model_dump(mode="json")]
    described["fingerprint"] = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    before = _earlier_export(out)
    if before is not None and before.fingerprint == described["fingerprint"] and _is_whole(out, before):
        return Exported(out, before.files, stop - start, made=False)
    with _new_folder(out) as folder:
        files = _write_rows(source, folder, to, range(start, stop))
        for name, url in tokenizer_files([source]).items():
            carry_file(url, folder / name, link=False)
        (folder / "README.md").write_text(_card(source, described), encoding="utf-8")
        beside = sorted({path.name for path in folder.iterdir()} - files.keys())
        marker = described | {"files": files, "beside": beside}
        (folder / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
    return Exported(out, files, stop - start, made=True)


def _earlier_export(out: Path) -> _Marker | None:
    """What an earlier export in `out` says of itself; ValueError where anything else is there, too."""
    there = {path.name for path in out.iterdir()} if out.is_dir() else {out.name} if out.exists() else set()
    if not there:
        return None
    with contextlib.suppress(OSError, ValueError):
        said = _Marker.model_validate_json((out / MARKER).read_bytes())
        there -= {MARKER, *said.files, *said.beside}
        if not there:
            return said
    raise ValueError(
        f"out: got {out}: it holds something else ({', '.join(sorted(there)[:3])}); wanted a folder, new, empty or of "
        "an earlier export alone; name another, or move what is not of the export"
    )


def _is_whole(out: Path, said: _Marker) -> bool:
    try:
        whole = all((out / name).stat().st_size == size for name, size in said.files.items())
        return whole and all((out / name).is_file() for name in said.beside)
    except FileNotFoundError:
        return False


def _remove_export(folder: Path) -> None:
    """Remove an export, the marker last, so that one that is killed here can be removed by the next."""
    if _earlier_export(folder) is not None:
        for path in sorted(folder.iterdir(), key=lambda path: path.name == MARKER):
            path.unlink()
    folder.rmdir()


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` when the block ends well, and is removed when it does not."""
    out = out.resolve()
    folder, old = out.with_name(f".{out.name}.export"), out.with_name(f".{out.name}.export-old")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not folder.exists() or os.fstat(lock).st_ino != folder.stat().st_ino:
                raise BlockingIOError  # another export has just ended
        except BlockingIOError:
            raise ValueError(f"out: got {out}: another export is writing there; wait for it or stop it") from None
        for path in folder.iterdir():  # of an export that was killed
            path.unlink()
        if old.exists():
            _remove_export(old)
        try:
            yield folder
            for path in folder.iterdir():
                _sync(path)
            _sync(folder)
            if replaces := out.exists():
                _earlier_export(out)  # something else may have come while we wrote
                os.rename(out, old)
            os.rename(folder, out)
            _sync(out.parent)
            if replaces:
                _remove_export(old)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_rows(dataset: Dataset, folder: Path, to: str, rows: range) -> dict[str, int]:
    """Name and bytes of each file that holds rows."""
    write: Callable[[Dataset, range, BinaryIO], None]
    write = {"hf": _write_parquet, "npz": _write_npz, "jsonl": _write_json, "jsonl.zst": _write_zst}[to]
    rows_per_file = max(1, FILE_TOKENS // dataset.info.row_length)
    num_files = -(-len(rows) // rows_per_file)
    files = {}
    with Progress("export", len(rows), "rows") as progress:
        for number in range(num_files):
            part = rows[number * rows_per_file : (number + 1) * rows_per_file]
            path = folder / f"rows-{number:05d}-of-{num_files:05d}.{FORMATS[to]}"
            with open(path, "wb") as file:
                write(dataset, part, file)
            files[path.name] = path.stat().st_size
            progress.advance(len(part), f"{number + 1} files")
    return files


def _stacked(dataset: Dataset, rows: range) -> dict[str, np.ndarray]:
    """The five arrays of the rows, each [rows, row_length]."""
    arrays: Any = dataset.read_batch(rows)
    return {name: np.ascontiguousarray(arrays[name], dtype) for name, dtype in DTYPES.items()}


def _write_parquet(dataset: Dataset, rows: range, file: BinaryIO) -> None:
    length = dataset.info.row_length
    of = {name: pa.from_numpy_dtype(dtype) for name, dtype in DTYPES.items()}
    schema = pa.schema([pa.field(name, pa.list_(pa.field("element", of[name], nullable=False), length)) for name in of])
    group = max(1, GROUP_TOKENS // length)
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for at in range(0, len(rows), group):
            stacked = _stacked(dataset, rows[at : at + group])
            columns = [
                pa.FixedSizeListArray.from_arrays(pa.array(stacked[field.name].reshape(-1)), type=field.type)
                for field in schema
            ]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=group)


def _write_npz(dataset: Dataset, rows: range, file: BinaryIO) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in _stacked(dataset, rows).items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _write_zst(dataset: Dataset, rows: range, file: BinaryIO) -> None:
    with zstandard.ZstdCompressor(level=3).stream_writer(file, closefd=False) as compressed:
        _write_json(dataset, rows, compressed)


def _write_json(dataset: Dataset, rows: range, file: BinaryIO) -> None:
    """A line per example, or per piece of one in a naive row."""
    for row, lines in groupby(_examples(dataset, rows), key=lambda line: int(line["row"])):
        packed = dataset.packed(row)
        arrays = packed.arrays()
        vision, weights = arrays["vision_mask"], arrays["loss_weights"]
        begin = 0
        for line in lines:
            inside = slice(begin, begin + line["num_tokens"])
            begin = inside.stop
            said = {name: line[name] for name in ("row", "segment", "source", "key", "part")}
            said["text"] = _text(dataset.text_tokenizer, packed.tokens[inside], vision[inside])
            said["tokens"] = packed.tokens[inside].tolist()
            said["vision_mask"] = vision[inside].astype(int).tolist()
            said["loss_weights"] = weights[inside].tolist()
            file.write(json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")


def _examples(dataset: Dataset, rows: range) -> Iterator[dict[str, Any]]:
    """The examples table's lines of `rows`; `row` is counted in the dataset."""
    first_row = 0
    for shard in dataset.info.shards:
        start, stop = max(rows.start - first_row, 0), min(rows.stop - first_row, shard.num_rows)
        if start < stop:
            table = read_examples(dataset, shard)
            first, last = np.searchsorted(table["row"].to_numpy(), [start, stop]).tolist()
            for batch in table.slice(first, last - first).to_batches(1 << 12):
                yield from (line | {"row": line["row"] + first_row} for line in batch.to_pylist())
        first_row += shard.num_rows


def _text(tokenizer: TextTokenizer, tokens: np.ndarray, vision: np.ndarray) -> str:
    """The text of an example's tokens; a vision block is its codes in words: `<vision> 17 512 ... EOV </vision>`."""
    names = {EOF: "EOF", EOV: "EOV"}
    cuts = [0, *(np.flatnonzero(np.diff(vision)) + 1).tolist(), len(tokens)]
    texts = []
    for start, stop in pairwise(cuts):
        ids = tokens[start:stop].astype(np.int32)
        if vision[start]:
            texts.append(f" {' '.join(names.get(code, str(code)) for code in ids.tolist())} ")
        else:
            texts.append(tokenizer.decode(ids))
    return "".join(texts)


def _card(dataset: Dataset, described: dict[str, Any]) -> str:
    """README.md of the export."""
    info = dataset.info
    return f"""# {info.name}

Rows {described["first_row"]:,} to {described["first_row"] + described["num_rows"] - 1:,} of the dataset `{info.name}`
(fingerprint `{info.fingerprint}`), rows of {info.row_length:,} tokens, packing `{info.packing}`, loss weighting
`{info.loss_weighting}`. Text tokenizer: {info.text_vocab_size:,} pieces, in this folder.

```python
{_reading(described["to"])}
```
"""


def _reading(to: str) -> str:
    """Code that reads the files, however many, from their folder."""
    if to == "hf":
        return 'import datasets\n\nrows = datasets.load_dataset("parquet", data_files="rows-*.parquet", split="train")'
    imports, opened, read = {
        "npz": ("numpy as np", "np.load(name) as rows", 'tokens = rows["tokens"]  # and so on'),
        "jsonl": ("json", 'open(name, encoding="utf-8") as lines', "examples = [json.loads(line) for line in lines]"),
        "jsonl.zst": (
            "json\n\nimport zstandard",
            'zstandard.open(name, "rt", encoding="utf-8") as lines',
            "examples = [json.loads(line) for line in lines]",
        ),
    }[to]
    return f"""import glob
import {imports}

for name in sorted(glob.glob("rows-*.{FORMATS[to]}")):
    with {opened}:
        {read}"""
