"""index.json: what a dataset is, and where its rows lie. Written last, so that a folder without it is no dataset."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import fsspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from lwm_data.format.atomic import write_whole
from lwm_data.format.packed import LossWeighting, Packing
from lwm_data.format.retry import refusal

FORMAT_VERSION: Final = 2  # that is written; all before are read
INDEX = "index.json"
TRUNCATED = ("truncated", "thinned")  # reasons of records that are one example, and not whole


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ShardInfo:
    """What the index holds of one shard. `offsets_at`: where the data of `__offsets__` begin in the tar.

    A dataclass with slots, since an index may have 100,000 of them, which as models take twice the memory.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.tar$")]
    num_rows: Annotated[int, Field(ge=1)]
    num_bytes: Annotated[int, Field(ge=1)]
    sha256: str
    offsets_at: Annotated[int, Field(ge=0)]
    examples_sha256: str


class SourceCounts(_Frozen):
    """Of one source: records read and rejected, examples made of the others, and their tokens.

    left_out: examples that are in no row, since the shares of the sources ask for fewer. reasons: as `rejected` of the
    whole dataset: why records were rejected, split or truncated.
    """

    records: int = 0
    rejected: int = 0
    reasons: dict[str, int] = Field(default={}, description="reason -> records")
    left_out: int = 0
    examples: int = 0
    tokens: int = 0
    vision_tokens: int = 0
    trained_tokens: int = 0

    @property
    def split(self) -> int:
        """Records that are several examples."""
        return self.reasons.get("split", 0)

    @property
    def truncated(self) -> int:
        """Records of which one example is left that is not the whole."""
        return sum(self.reasons.get(reason, 0) for reason in TRUNCATED)

    @property
    def kept(self) -> int:
        """Records that are one example, whole."""
        return self.records - self.rejected - self.split - self.truncated

    def __add__(self, other: SourceCounts) -> SourceCounts:
        numbers = [name for name in SourceCounts.model_fields if name != "reasons"]
        reasons = Counter(self.reasons) + Counter(other.reasons)
        sums = {name: getattr(self, name) + getattr(other, name) for name in numbers}
        return SourceCounts(reasons=dict(sorted(reasons.items())), **sums)


class DatasetInfo(_Frozen):
    """index.json."""

    format_version: Literal[1, 2]
    name: str
    row_length: int = Field(ge=2, lt=1 << 31)
    rows_per_page: int = Field(ge=1)
    dtype: Literal["uint16", "uint32"]
    packing: Packing
    loss_weighting: LossWeighting
    num_rows: int
    num_tokens: int = Field(description="without padding")
    num_trained: int = Field(description="tokens of loss weight above 0")
    text_vocab_size: int
    tokenizer_fingerprint: str
    vision_tokenizer_fingerprint: str | None = Field(default=None, description="of what made the rows' vision tokens")
    build_fingerprint: str = Field(
        description="of everything the build read: manifest, inputs, tokenizer, code version"
    )
    sources: dict[str, SourceCounts]
    rejected: dict[str, int] = Field(description="reason -> records")
    manifest: dict[str, Any]
    shards: tuple[ShardInfo, ...]

    @model_validator(mode="after")
    def _rows_add_up(self) -> DatasetInfo:
        if self.num_rows != sum(shard.num_rows for shard in self.shards):
            raise ValueError(f"num_rows is {self.num_rows:,}, and not what its shards have together")
        return self

    @cached_property
    def fingerprint(self) -> str:
        """Equal for two datasets exactly when their rows and tokenizers are equal."""
        parts = [self.tokenizer_fingerprint, str(self.row_length), *(shard.sha256 for shard in self.shards)]
        parts += [self.vision_tokenizer_fingerprint] if self.vision_tokenizer_fingerprint else []
        return hashlib.sha256("|".join(parts).encode()).hexdigest()


def write_index(folder: Path, info: DatasetInfo) -> None:
    """Write index.json atomically; from then on the folder is a dataset."""
    fields = info.model_dump(
        exclude={"vision_tokenizer_fingerprint"} if not info.vision_tokenizer_fingerprint else None
    )
    write_whole(folder / INDEX, json.dumps(fields, indent=1) + "\n")


def read_index(url: str) -> DatasetInfo:
    """The index of the dataset in the folder `url` (a path or any fsspec URL).

    ValueError where there is none, where it is unfinished, of a newer format version, or on a store whose package
    is not installed.
    """
    path = f"{url}/{INDEX}"
    try:
        with fsspec.open(path, "rb") if "://" in url else open(path, "rb") as file:  # fsspec's first use takes 3 ms
            raw = json.loads(file.read())
    except ImportError as error:  # fsspec knows the protocol, but what speaks it is a package of its own
        package = getattr(error.__cause__, "name", None)
        remedy = f"pip install {package}" if package else str(error)
        raise ValueError(f"{url}: reading it needs a package that is not installed: {remedy}") from error
    except FileNotFoundError:
        raise ValueError(
            f"{url}: no {INDEX}: not a dataset, or its build did not finish (run the build again)"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    except Exception as error:
        if "://" not in url:
            raise
        raise refusal(error, url, "read") from error
    if not isinstance(raw, dict) or "format_version" not in raw:
        raise ValueError(f"{path}: no format_version: not the index of a dataset")
    version = raw["format_version"]
    if version not in range(1, FORMAT_VERSION + 1):
        raise ValueError(
            f"{path}: format_version: got {version!r}; this version of lwm reads 1 to {FORMAT_VERSION}; update lwm"
        )
    try:
        return DatasetInfo.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"{path}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from error
