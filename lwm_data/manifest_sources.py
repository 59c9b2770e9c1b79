"""The sources that a dataset manifest can name, one class per `type:`.

sources:
  - {name: novels, type: books, path: novels/*.txt, share: 0.6}
  - {name: photos, type: images, path: photos/*.tar, order: random, where: "pwatermark < 0.8", share: 0.3}
  - {name: talk, type: chats, path: chats/*.jsonl.zst, pack_with: own, share: 0.1}
"""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from lwm_data.format.manifest import ManifestModel
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


def _absolute_glob(value: str, info: ValidationInfo) -> str:
    folder = (info.context or {}).get("folder")
    if "://" in value or folder is None:
        return value
    return os.path.abspath(Path(glob.escape(str(Path(folder).absolute()))) / Path(value).expanduser())


ManifestGlob = Annotated[str, AfterValidator(_absolute_glob)]
"""As ManifestPath, of a glob: no character of the manifest's own folder is taken for a wildcard."""


class TokenFilter(ManifestModel):
    """Records of min <= tokens < max, BOS and EOS counted; half open, so that no record is in two adjacent ranges."""

    min: int = Field(default=1, ge=1, description="the least that is taken")
    max: int | None = Field(default=None, ge=2, description="the least that is too long")

    @model_validator(mode="after")
    def _ordered(self) -> TokenFilter:
        if self.max is not None and self.min >= self.max:
            raise ValueError(f"min < max (got min {self.min}, max {self.max}); max itself is not taken")
        return self


class Clean(ManifestModel):
    """What is done to a text before it is tokenized."""

    unicode: Literal["nfc", "nfkc"] | None = Field(default=None, description="Unicode normalisation form")
    gutenberg: bool = Field(default=False, description="cut off Project Gutenberg's header and licence")


class Split(ManifestModel):
    """A share of the documents is held out: which ones, the documents' keys and `seed` alone decide."""

    heldout: float = Field(gt=0, lt=1, description="share of the documents that is held out")
    take: Literal["train", "heldout"] = Field(description="which side this source takes")
    seed: int = Field(default=0, ge=0, description="the same in the manifests of both sides")


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
    deduplicate: bool = Field(default=True, description="whether the dataset's `duplicates` are looked for in it")
    decontaminate: bool = Field(default=True, description="whether the dataset's `contamination` is")


class Documents(SourceModel):
    """What sources of whole documents have in common."""

    path: ManifestGlob
    split: Split | None = Field(default=None, description="take one side of a split by document")


class Books(Documents):
    """Plain text, one file one record; .gz and .zst are unpacked on the way."""

    type: Literal["books"]
    path: ManifestGlob = Field(description="glob of UTF-8 text files, one book each")
    tokens: TokenFilter = Field(default=TokenFilter(), description="which books to take, by their whole length")
    clean: Clean = Field(default=Clean(), description="what is done to a text first")
    overflow: Literal["split", "truncate", "drop", "error"] = Field(
        default="split", description="what to do with a book longer than a row"
    )
    trained: Literal["all"] = "all"


class Text(Documents):
    """Texts of any file that holds many: rows with a field, lines, samples of tars, or small files."""

    type: Literal["text"]
    path: ManifestGlob = Field(
        description="glob of .jsonl, .json, .parquet, .arrow, .tar or text files, or a folder saved by `datasets`"
    )
    field: str = Field(default="text", min_length=1, description="field or column with the text")
    key: str | None = Field(
        default=None, min_length=1, description="field that names the record; default: `id` where it is, else its place"
    )
    records: Literal["file", "lines"] = Field(default="file", description="what is a record of a plain text file")
    tokens: TokenFilter = Field(default=TokenFilter(), description="which texts to take, by their whole length")
    clean: Clean = Field(default=Clean(), description="what is done to a text first")
    overflow: Literal["split", "truncate", "drop", "error"] = Field(default="split", description="longer than a row")


class Chats(Documents):
    """Chats as UltraChat (`data`), ShareGPT (`conversations`) and OpenAI (`messages`) have them, told by their keys."""

    type: Literal["chats"]
    path: ManifestGlob = Field(
        description="glob of .jsonl, .json, .parquet or .arrow files, or a folder saved by `datasets`"
    )
    key: str | None = Field(
        default=None, min_length=1, description="field that names the chat; default: `id` where it is, else its place"
    )
    overflow: Literal["truncate", "drop", "error"] = Field(default="drop", description="a chat longer than a row")


class Tokens(Documents):
    """Arrays of text token ids: .npy streams, or a list a row. Vision tokens are not read: give pixels or codes."""

    type: Literal["tokens"]
    path: ManifestGlob = Field(
        description="glob of .npy, .jsonl, .parquet or .arrow files, or a folder saved by `datasets`"
    )
    field: str = Field(default="input_ids", min_length=1, description="field or column with the list of ids")
    key: str | None = Field(
        default=None, min_length=1, description="field that names the record; default: `id` where it is, else its place"
    )
    trained: str | None = Field(default=None, min_length=1, description="field with a 0 or 1 for each id")
    labels: str | None = Field(
        default=None, min_length=1, description="field with labels as Hugging Face has them: the id, or -100"
    )
    tokens: TokenFilter = Field(default=TokenFilter(), description="which records to take, by their whole length")
    overflow: Literal["split", "truncate", "drop", "error"] = Field(default="split", description="longer than a row")

    @model_validator(mode="after")
    def _has_one_mask(self) -> Tokens:
        if self.trained is not None and self.labels is not None:
            raise ValueError("one of trained and labels")
        return self


class Needles(SourceModel):
    """Made-up retrieval examples: facts planted in a text, some of them asked for; only the answer is trained."""

    type: Literal["needles"]
    deduplicate: bool = Field(default=False, description="off by default: made up, of texts that many share")
    count: int = Field(ge=1, description="number of examples")
    haystack: ManifestGlob = Field(description="glob of UTF-8 text files that the filler is cut from")
    tokens: Count = Field(description="length of each example, drawn uniformly; never above max")
    needles: Count = Field(default=Span(min=1, max=1), description="facts planted in each example")
    asked: Count = Field(default=Span(min=1, max=1), description="facts asked for, of those planted")
    split: Split | None = Field(default=None, description="take the haystack's files of one side of a split")
    overflow: Literal["error"] = "error"

    @model_validator(mode="after")
    def _asks_what_is_there(self) -> Needles:
        if self.asked.min > self.needles.min:
            raise ValueError(f"asked.min <= needles.min (got {self.asked.min} and {self.needles.min})")
        if self.needles.max > len(CITIES):
            raise ValueError(f"needles.max <= {len(CITIES)}, a city for each fact (got {self.needles.max})")
        return self


class Qa(SourceModel):
    """Books with questions about them, as `lwm-data qa` writes: a long context, then questions; answers are trained."""

    type: Literal["qa"]
    deduplicate: bool = Field(default=False, description="off by default: examples may share their context")
    path: ManifestGlob = Field(description="glob of files of pairs: .jsonl (.gz, .zst), .parquet or .arrow")
    books: ManifestGlob = Field(description="glob of the books that the pairs are about, as in the qa manifest")
    tokens: Count = Field(description="length of each example, drawn uniformly, which it fills as far as chunks allow")
    join: int = Field(default=1, ge=1, le=256, description="books, by name, that are read end to end as one")
    order: Literal["random", "reading", "interleaved"] = Field(
        default="random",
        description="questions at the end, shuffled or in reading order; or each after its chunk, some of them later",
    )
    depth: Literal["as-is", "uniform"] = Field(
        default="as-is", description="contexts one after another, or placed so that evidence is as often anywhere"
    )
    questions: Count | None = Field(default=None, description="of each example, drawn; default: as many as may be")
    max_trained: float = Field(default=0.01, gt=0, le=1, description="the share of an example that may be trained")
    repeat: int = Field(default=1, ge=1, le=1000, description="how often each pair is asked")
    split: Split | None = Field(default=None, description="take the books of one side of a split")
    overflow: Literal["error"] = "error"

    @model_validator(mode="after")
    def _has_depths_to_choose(self) -> Qa:
        if self.depth == "uniform" and self.order == "interleaved":
            raise ValueError("depth: uniform with order random or reading (interleaved asks soon after the evidence)")
        return self


class LwmJsonl(SourceModel):
    """The release's JSON lines: text fields and lists of codes, joined as a field spec says (`[masked]`, `a+b`)."""

    type: Literal["lwm_jsonl"]
    path: ManifestGlob = Field(description="glob of .jsonl, .jsonl.gz or .jsonl.zst files")
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

    deduplicate: bool = Field(default=False, description="off by default: different pictures may have one caption")
    path: ManifestGlob
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
    path: ManifestGlob = Field(description="glob of .tar, .parquet, .arrow or picture files; captions beside them")
    overflow: Literal["truncate", "drop", "error"] = Field(default="drop", description="longer than a row")


class Videos(Media):
    """Videos with captions: video2dataset tars, lists (.jsonl, .csv, .parquet) of files and times, or video files."""

    type: Literal["videos"]
    path: ManifestGlob = Field(description="glob of .tar, .jsonl, .csv, .parquet or video files; captions beside them")
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


AnySource = Books | Text | Chats | Tokens | Needles | Qa | LwmJsonl | Images | Videos
Source = Annotated[AnySource, Field(discriminator="type")]
