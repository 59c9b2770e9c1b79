"""A dataset on disk: a folder of shards with an index that is written last.

    index.json                       format version, row length, shards with rows, sizes and sha256, fingerprints
    shard-000000.tar                 rows (shard.py)
    shard-000000.examples.parquet    which example lies in which row and segment
    text_tokenizer.yaml, .model      the tokenizer of the rows' text
    rejected.jsonl                   records that were not taken, each with its reason
    README.md                        dataset card

A folder without `index.json` is no dataset: a build that was stopped can never be taken for a whole one.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

import fsspec
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lwm_data.format.atomic import write_whole
from lwm_data.format.packed import Arrays, LossWeighting, PackedSequence, Packing
from lwm_data.format.shard import RangeReader, Shard
from lwm_data.format.vocab import TextTokenizer, load_text_tokenizer

FORMAT_VERSION: Final = 1
INDEX = "index.json"
OPEN_SHARDS = 64  # file handles and offset tables kept at a time


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardInfo(_Frozen):
    """What the index holds of one shard. `offsets_at`: where the data of `__offsets__` begin in the tar."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.tar$")
    num_rows: int = Field(ge=1)
    num_bytes: int = Field(ge=1)
    sha256: str
    offsets_at: int = Field(ge=0)
    examples_sha256: str


class SourceCounts(_Frozen):
    """Of one source: records read and rejected, examples made of the others, and their tokens."""

    records: int = 0
    rejected: int = 0
    examples: int = 0
    tokens: int = 0
    vision_tokens: int = 0
    trained_tokens: int = 0


class DatasetInfo(_Frozen):
    """index.json."""

    format_version: Literal[1]
    name: str
    row_length: int = Field(ge=2)
    rows_per_page: int = Field(ge=1)
    dtype: Literal["uint16", "uint32"]
    packing: Packing
    loss_weighting: LossWeighting
    num_rows: int
    num_tokens: int = Field(description="without padding")
    num_trained: int = Field(description="tokens of loss weight above 0")
    text_vocab_size: int
    tokenizer_fingerprint: str
    build_fingerprint: str = Field(
        description="of everything the build read: manifest, inputs, tokenizer, code version"
    )
    sources: dict[str, SourceCounts]
    rejected: dict[str, int] = Field(description="reason -> records")
    manifest: dict[str, Any]
    shards: tuple[ShardInfo, ...]

    @cached_property
    def fingerprint(self) -> str:
        """Equal for two datasets exactly when their rows and tokenizer are equal."""
        parts = [self.tokenizer_fingerprint, str(self.row_length), *(shard.sha256 for shard in self.shards)]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()


def write_index(folder: Path, info: DatasetInfo) -> None:
    """Write index.json atomically; from then on the folder is a dataset."""
    write_whole(folder / INDEX, json.dumps(info.model_dump(), indent=1) + "\n")


class Dataset:
    """Random access to packed rows; opening costs the index alone, a row costs its own bytes.

    len(d) is the number of rows; d[i] the five arrays of row i (see `Arrays`); d.read(i, start, stop) those of a
    slice of it; d.packed(i) the row with its run table.
    """

    def __init__(self, url: str, info: DatasetInfo) -> None:
        self.url, self.info = url, info
        self._first_rows = list(itertools.accumulate((shard.num_rows for shard in info.shards), initial=0))
        self._dtype = np.dtype(info.dtype).newbyteorder("<")
        self._open: dict[int, Shard] = {}

    def __len__(self) -> int:
        return self.info.num_rows

    def __getitem__(self, row: int) -> Arrays:
        return self.read(row, 0, self.info.row_length)

    def read(self, row: int, start: int, stop: int) -> Arrays:
        """The arrays of tokens start..stop of row `row`; only their bytes and the row's run table are read."""
        if not 0 <= start < stop <= self.info.row_length:
            raise ValueError(f"tokens {start}..{stop} of a row of {self.info.row_length:,}")
        shard, r = self._find(row)
        return shard.arrays(r, start, stop)

    def packed(self, row: int) -> PackedSequence:
        """Row `row` with its runs and weights."""
        shard, r = self._find(row)
        return shard.row(r)

    @cached_property
    def text_tokenizer(self) -> TextTokenizer:
        """The tokenizer that lies in the dataset's folder; ValueError where it is not the index's."""
        if "://" in self.url:
            with tempfile.TemporaryDirectory() as folder:
                for name in ("text_tokenizer.yaml", "text_tokenizer.model"):
                    with fsspec.open(f"{self.url}/{name}", "rb") as file:
                        (Path(folder) / name).write_bytes(file.read())
                tokenizer = load_text_tokenizer(Path(folder) / "text_tokenizer.yaml")
        else:
            tokenizer = load_text_tokenizer(Path(self.url) / "text_tokenizer.yaml")
        if tokenizer.fingerprint != self.info.tokenizer_fingerprint:
            raise ValueError(
                f"{self.url}: text_tokenizer.yaml is not the tokenizer this dataset was built with "
                f"(got {tokenizer.fingerprint[:12]}, the index wants {self.info.tokenizer_fingerprint[:12]})"
            )
        return tokenizer

    def _find(self, row: int) -> tuple[Shard, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"{self.url}: row {row}; it has rows 0 to {len(self) - 1}")
        number = bisect.bisect_right(self._first_rows, row) - 1
        if number not in self._open:
            if len(self._open) >= OPEN_SHARDS:
                del self._open[next(iter(self._open))]
            self._open[number] = self._shard(self.info.shards[number])
        return self._open[number], row - self._first_rows[number]

    def _shard(self, shard: ShardInfo) -> Shard:
        path = f"{self.url}/{shard.name}"
        read, num_bytes = _range_reader(path)
        if num_bytes != shard.num_bytes:
            raise ValueError(
                f"{path}: {num_bytes:,} bytes, the index says {shard.num_bytes:,}: a truncated or changed shard; "
                "build again"
            )
        return Shard(read, self.info.row_length, self._dtype, self.info.rows_per_page, shard.num_rows, shard.offsets_at)


def open_dataset(url: str | Path) -> Dataset:
    """The dataset in the folder `url` (a path or any fsspec URL).

    ValueError where there is none, where it is unfinished, of a newer format version, or on a store whose package
    is not installed.
    """
    url = str(url).rstrip("/")
    path = f"{url}/{INDEX}"
    try:
        with fsspec.open(path, "rb") as file:
            raw = json.loads(file.read())
    except ImportError as error:  # fsspec knows the protocol, but what speaks it is a package of its own
        package = getattr(error.__cause__, "name", None)
        remedy = f"pip install {package}" if package else str(error)
        raise ValueError(f"{url}: reading it needs a package that is not installed: {remedy}") from error
    except FileNotFoundError:
        raise ValueError(
            f"{url}: no {INDEX}: not a dataset, or its build did not finish (run the build again)"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version: got {version!r}; this version of lwm reads {FORMAT_VERSION}; update lwm"
        )
    try:
        return Dataset(url, DatasetInfo.model_validate(raw))
    except ValidationError as error:
        raise ValueError(f"{path}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from error


def _range_reader(path: str) -> tuple[RangeReader, int]:
    """A reader of exact ranges of the file, and the file's size in bytes."""
    if "://" not in path:
        return _LocalRanges(path), os.stat(path).st_size
    fs, inner = fsspec.core.url_to_fs(path)

    def read(start: int, stop: int) -> bytes:
        return bytes(fs.cat_file(inner, start=start, end=stop))

    return read, int(fs.size(inner))


class _LocalRanges:
    """pread of a local file; the descriptor is closed with the object."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may be gone when the program ends
        if hasattr(self, "_descriptor"):
            close(self._descriptor)

    def __call__(self, start: int, stop: int) -> bytes:
        data = os.pread(self._descriptor, stop - start, start)
        if len(data) != stop - start:
            raise ValueError(
                f"{PurePosixPath(self._path).name}: {len(data)} of {stop - start} bytes at {start}: truncated"
            )
        return data
