"""The manifest of a dataset: what a person writes to have one built.

kind: dataset
name: demo
out: ../../runs/demo/dataset
text_tokenizer: ../../tokenizers/demo-text.yaml
row_length: 4096
sources:
  - {name: novels, type: books, path: novels/*.txt}
  - {name: talk, type: chats, path: chats/*.jsonl.zst}
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from lwm_data.format.manifest import ManifestModel, ManifestPath, read_manifest
from lwm_data.format.packed import LossWeighting, Packing
from lwm_data.format.prompt import CITIES

Overflow = Literal["split", "truncate", "drop", "error"]
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def _bytes(value: Any) -> Any:
    match = re.fullmatch(r"([0-9.]+) *([KMG]?B?)", value) if isinstance(value, str) else None
    if match is None or match[2] not in UNITS:
        return value
    return int(float(match[1]) * UNITS[match[2]])


def _range(value: Any) -> Any:
    return {"min": value, "max": value} if isinstance(value, int) else value


def _on_disk(value: str) -> str:
    if "://" in value:
        raise ValueError("a folder on disk, no URL; build there and copy it")
    return value


FolderPath = Annotated[ManifestPath, AfterValidator(_on_disk)]


class Span(ManifestModel):
    """Of a number that is drawn or filtered: min <= number <= max. Where it stands, one number alone means both."""

    min: int = Field(ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Span:
        if self.min > self.max:
            raise ValueError(f"min <= max (got min {self.min}, max {self.max})")
        return self


Count = Annotated[Span, BeforeValidator(_range)]


class TokenFilter(ManifestModel):
    """Records with fewer or more tokens than this are rejected."""

    min: int = Field(default=1, ge=1)
    max: int | None = Field(default=None, ge=1)


class Books(ManifestModel):
    """Plain text, one file one record; .gz and .zst are unpacked on the way."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    type: Literal["books"]
    path: ManifestPath = Field(description="glob of UTF-8 text files, one book each")
    tokens: TokenFilter = Field(default=TokenFilter(), description="which books to take, by their whole length")
    overflow: Overflow = Field(default="split", description="what to do with a book longer than a row")
    trained: Literal["all"] = "all"


class Chats(ManifestModel):
    """UltraChat rows: {"id": ..., "data": [user, assistant, user, ...]}, one a line."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    type: Literal["chats"]
    path: ManifestPath = Field(description="glob of .jsonl, .jsonl.gz or .jsonl.zst files")
    overflow: Literal["truncate", "drop", "error"] = Field(default="drop", description="a chat longer than a row")


class Needles(ManifestModel):
    """Made-up retrieval examples: facts planted in a text, some of them asked for; only the answer is trained."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    type: Literal["needles"]
    count: int = Field(ge=1, description="number of examples")
    haystack: ManifestPath = Field(description="glob of UTF-8 text files that the filler is cut from")
    tokens: Count = Field(description="length of each example, drawn uniformly; never above max")
    needles: Count = Field(default=Span(min=1, max=1), description="facts planted in each example")
    asked: Count = Field(default=Span(min=1, max=1), description="facts asked for, of those planted")
    overflow: Literal["error"] = "error"

    @model_validator(mode="after")
    def _asks_what_is_there(self) -> Needles:
        if self.asked.min > self.needles.min:
            raise ValueError(f"asked.min <= needles.min (got {self.asked.min} and {self.needles.min})")
        if self.needles.max > len(CITIES):
            raise ValueError(f"needles.max <= {len(CITIES)}, a city for each fact (got {self.needles.max})")
        return self


Source = Annotated[Books | Chats | Needles, Field(discriminator="type")]


class DatasetManifest(ManifestModel):
    """`kind: dataset`."""

    kind: Literal["dataset"]
    name: str = Field(min_length=1)
    seed: int = Field(default=0, ge=0, description="of the order of examples and of what is drawn at random")
    out: FolderPath = Field(description="folder of the dataset")
    token_store: FolderPath | None = Field(
        default=None, description="folder of tokenized input, shared by datasets; default: token-store beside `out`"
    )
    text_tokenizer: ManifestPath = Field(description="tokenizers/*.yaml")
    row_length: int = Field(ge=2, description="tokens in one packed row")
    packing: Packing = "masked"
    loss_weighting: LossWeighting = "example"
    shard_size: Annotated[int, BeforeValidator(_bytes)] = Field(
        default=256 * 10**6, ge=1, description="bytes of tokens in a shard, for instance 256MB"
    )
    max_rejected: float = Field(
        default=0.05, ge=0, le=1, description="share of a source's records that may be bad before the build fails"
    )
    sources: tuple[Source, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_are_unique(self) -> DatasetManifest:
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"sources of different names (two are called {name})")
        return self


def read_dataset_manifest(path: str | Path, overrides: Sequence[str] = ()) -> DatasetManifest:
    """The dataset manifest at `path` with `--set` overrides; ValueError names file, line, key, got and wanted."""
    manifest = read_manifest(path, {"dataset": DatasetManifest}, overrides)
    assert isinstance(manifest, DatasetManifest)
    return manifest
