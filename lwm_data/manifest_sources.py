"""The sources that a dataset manifest can name, one class per `type:`.

sources:
  - {name: novels, type: books, path: novels/*.txt, share: 0.6}
  - {name: photos, type: images, path: photos/*.tar, order: random, where: "pwatermark < 0.8", share: 0.3}
  - {name: talk, type: chats, path: chats/*.jsonl.zst, pack_with: own, share: 0.1}
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from lwm_data.format.manifest import ManifestModel, ManifestPath
from lwm_data.format.prompt import CITIES
from lwm_data.where import parse_where

Overflow = Literal["split", "truncate", "thin", "drop", "error"]
Order = Literal["random", "text-first", "vision-first"]


class Span(ManifestModel):
    """Of a number that is drawn or filtered: min <= number <= max. Where it stands, one number alone means both."""

    min: int = Field(ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Span:
        if self.min > self.max:
            raise ValueError(f"min <= max (got min {self.min}, max {self.max})")
        return self


def _range(value: Any) -> Any:
    return {"min": value, "max": value} if isinstance(value, int) else value


Count = Annotated[Span, BeforeValidator(_range)]


class TokenFilter(ManifestModel):
    """Records with fewer or more tokens than this are rejected."""

    min: int = Field(default=1, ge=1)
    max: int | None = Field(default=None, ge=1)


def _condition(text: str) -> str:
    parse_where(text)
    return text


class SourceModel(ManifestModel):
    """What every source has."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    share: float | None = Field(
        default=None, gt=0, description="its part of the dataset, in proportion to the others'; without, all there is"
    )
    pack_with: Literal["any", "own", "none"] = Field(
        default="any",
        description="whose examples may share a row with its own: any source's, only its own, or no other example",
    )


class Books(SourceModel):
    """Plain text, one file one record; .gz and .zst are unpacked on the way."""

    type: Literal["books"]
    path: ManifestPath = Field(description="glob of UTF-8 text files, one book each")
    tokens: TokenFilter = Field(default=TokenFilter(), description="which books to take, by their whole length")
    overflow: Literal["split", "truncate", "drop", "error"] = Field(
        default="split", description="what to do with a book longer than a row"
    )
    trained: Literal["all"] = "all"


class Chats(SourceModel):
    """UltraChat rows: {"id": ..., "data": [user, assistant, user, ...]}, one a line."""

    type: Literal["chats"]
    path: ManifestPath = Field(description="glob of .jsonl, .jsonl.gz or .jsonl.zst files")
    overflow: Literal["truncate", "drop", "error"] = Field(default="drop", description="a chat longer than a row")


class Needles(SourceModel):
    """Made-up retrieval examples: facts planted in a text, some of them asked for; only the answer is trained."""

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


class LwmJsonl(SourceModel):
    """The release's JSON lines: text fields and lists of codes, joined as a field spec says (`[masked]`, `a+b`)."""

    type: Literal["lwm_jsonl"]
    path: ManifestPath = Field(description="glob of .jsonl, .jsonl.gz or .jsonl.zst files")
    fields: str | None = Field(
        default=None, min_length=1, description="one spec for every line, e.g. '[question],[vision],answer'"
    )
    fields_from_example: str | None = Field(
        default=None,
        min_length=1,
        description="the key of each line's own spec, or list of specs of which one is drawn",
    )
    subfield_separator: str = Field(default=" ", description="between the values of a+b")
    prepend_text: str = Field(default="", description="before the first field, where that is text")
    max_frames: int | None = Field(default=None, ge=1, description="of a vision field; more are thinned out evenly")
    stray_bos: bool = Field(
        default=False, description="BOS before each text field and delimiter, as the release's last version wrote"
    )
    overflow: Overflow = Field(default="drop", description="what to do with an example longer than a row")

    @model_validator(mode="after")
    def _has_one_spec(self) -> LwmJsonl:
        if (self.fields is None) == (self.fields_from_example is None):
            raise ValueError("one of fields and fields_from_example")
        return self


class Media(SourceModel):
    """What images and videos have in common: a caption beside the pixels."""

    path: ManifestPath
    caption: str | None = Field(
        default=None, description="field with the caption; default: the .txt beside, or caption, TEXT or text"
    )
    min_size: int = Field(default=0, ge=0, description="least width and height, of the original where it is known")
    where: Annotated[str, AfterValidator(_condition)] | None = Field(
        default=None, description="condition on the fields, e.g. 'clip_similarity_vitb32 > 0.3 and pwatermark < 0.8'"
    )
    order: Order = Field(default="random", description="drawn per example from (seed, source, key), or fixed")
    train: Literal["both", "last"] = Field(default="both", description="which side is trained: both, or the second")


class Images(Media):
    """Pictures with captions: img2dataset tars, Parquet or Arrow files with their bytes, or picture files."""

    type: Literal["images"]
    path: ManifestPath = Field(description="glob of .tar, .parquet, .arrow or picture files; captions beside them")
    overflow: Literal["truncate", "drop", "error"] = Field(default="drop", description="longer than a row")


class Videos(Media):
    """Videos with captions: video2dataset tars, lists (.jsonl, .csv, .parquet) of files and times, or video files."""

    type: Literal["videos"]
    path: ManifestPath = Field(description="glob of .tar, .jsonl, .csv, .parquet or video files; captions beside them")
    fps: float = Field(gt=0, le=1000, description="frames taken per second, by their time stamps")
    max_frames: int = Field(ge=1, le=1 << 20, description="more are thinned out evenly over the clip")
    decoder: Literal["pyav", "decord"] = "pyav"
    clips: bool | None = Field(
        default=None,
        description="cut the clips or chapters that the metadata names, each a record; default: but where the file was "
        "cut to its clip already, as video2dataset does",
    )
    overflow: Overflow = Field(
        default="thin", description="longer than a row; thin: lose frames evenly; split: at a frame's border"
    )


Source = Annotated[Books | Chats | Needles | LwmJsonl | Images | Videos, Field(discriminator="type")]
AnySource = Books | Chats | Needles | LwmJsonl | Images | Videos
