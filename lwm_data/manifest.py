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

from pydantic import BeforeValidator, Field, model_validator

from lwm_data.format.manifest import ManifestModel, ManifestPath, read_manifest
from lwm_data.format.packed import LossWeighting, Packing
from lwm_data.manifest_sources import Images, ManifestGlob, Source, Videos

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def _bytes(value: Any) -> Any:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMG]?B?)", value) if isinstance(value, str) else None
    if match is None or match[2] not in UNITS:
        return value
    return int(float(match[1]) * UNITS[match[2]])


class DuplicateRule(ManifestModel):
    """Which copies of a record are left out; of several the first in the manifest's order stays."""

    exact: bool = Field(default=True, description="texts that are equal, but for white space and Unicode's forms")
    near: float | None = Field(
        default=None, ge=0.3, lt=1, description="least share of 5-word sequences that two have in common, e.g. 0.8"
    )


class Contamination(ManifestModel):
    """Which records hold evaluation text, and are left out."""

    texts: tuple[ManifestGlob, ...] = Field(min_length=1, description="globs of evaluation texts, .txt or .jsonl")
    words: int = Field(default=13, ge=3, le=100, description="in a row, that must be the same")
    field: str | None = Field(
        default=None, min_length=1, description="of a JSON line; default: question, answer and text, where they are"
    )
    least: int = Field(default=1, ge=1, description="such sequences in a record, from which on it is left out")


class DatasetManifest(ManifestModel):
    """`kind: dataset`."""

    kind: Literal["dataset"]
    name: str = Field(min_length=1)
    seed: int = Field(default=0, ge=0, description="of the order of examples and of what is drawn at random")
    out: ManifestPath = Field(description="folder of the dataset, on a disk or in an object store")
    token_store: ManifestPath | None = Field(
        default=None, description="folder of tokenized input, shared by datasets; default: token-store beside `out`"
    )
    text_tokenizer: ManifestPath = Field(description="tokenizers/*.yaml")
    vision_tokenizer: ManifestPath | None = Field(
        default=None, description="tokenizers/*.yaml; needed where a source has pictures or videos"
    )
    row_length: int = Field(ge=2, description="tokens in one packed row")
    packing: Packing = "masked"
    loss_weighting: LossWeighting = "example"
    share_by: Literal["tokens", "examples"] = Field(default="tokens", description="what a source's `share` counts")
    shard_size: Annotated[int, BeforeValidator(_bytes)] = Field(
        default=256 * 10**6, ge=1, description="bytes of tokens in a shard, for instance 256MB"
    )
    max_rejected: float = Field(
        default=0.05, ge=0, le=1, description="share of a source's records that may be bad before the build fails"
    )
    damaged: Literal["error", "keep"] = Field(
        default="error", description="a file of texts that cannot be read to its end: fail, or keep what comes before"
    )
    duplicates: DuplicateRule | None = Field(default=None, description="copies of records, to be left out")
    contamination: Contamination | None = Field(default=None, description="evaluation texts, to be kept out")
    sources: tuple[Source, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_are_unique(self) -> DatasetManifest:
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"sources of different names (two are called {name})")
        return self

    @model_validator(mode="after")
    def _shares_are_complete(self) -> DatasetManifest:
        without = [source.name for source in self.sources if source.share is None]
        if without and len(without) < len(self.sources):
            raise ValueError(f"a share for every source, or for none (none for {', '.join(without)})")
        return self

    @model_validator(mode="after")
    def _vision_has_a_tokenizer(self) -> DatasetManifest:
        seen = [source.name for source in self.sources if isinstance(source, Images | Videos)]
        if seen and self.vision_tokenizer is None:
            raise ValueError(f"vision_tokenizer: tokenizers/*.yaml, for the source {seen[0]}")
        return self

    @model_validator(mode="after")
    def _naive_rows_are_cut_anywhere(self) -> DatasetManifest:
        alone = [source.name for source in self.sources if source.pack_with == "none"]
        if alone and self.packing == "naive":
            raise ValueError(f"pack_with: none only under packing: masked (source {alone[0]})")
        return self


def read_dataset_manifest(path: str | Path, overrides: Sequence[str] = ()) -> DatasetManifest:
    """The dataset manifest at `path` with `--set` overrides; ValueError names file, line, key, got and wanted."""
    manifest = read_manifest(path, {"dataset": DatasetManifest}, overrides)
    assert isinstance(manifest, DatasetManifest)
    return manifest
