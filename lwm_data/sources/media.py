"""Pictures and videos with captions: what becomes of a record before any pixel is decoded, and its runs once coded.

tar, parquet, files -> fields + bytes -> admit -> MediaItem -> (decoded, encoded) -> media_runs
                                           |
                                           no caption | filtered: where | filtered: min_size | missing field | ...

text first     <s> A cat on a mat.  <vision> c0..c255 EOV </vision>  </s>
vision first   <s> <vision> c0..c255 EOV </vision>  A cat on a mat.  </s>
trained        both: all but <s>     last: what comes second, and </s>
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32

from lwm_data.format.example import Run, text_runs, vision_runs
from lwm_data.format.vocab import TextTokenizer
from lwm_data.manifest_sources import Images, Order, Videos
from lwm_data.sources.fields import Fields, UnreadableField
from lwm_data.sources.json_lines import holds_half_a_pair
from lwm_data.sources.media_units import group_files as group_files
from lwm_data.sources.record import Rejection
from lwm_data.where import Condition, parse_where

VERSION = 2  # raise it when the same files give other items
MAX_CAPTION = 64 << 10  # bytes of UTF-8
MAX_SIDE = 1 << 32  # pixels; a larger number is none
CAPTION_FIELDS = ("txt", "caption", "TEXT", "text")  # txt: the file beside, or img2dataset's Parquet column


@dataclass(frozen=True)
class MediaItem:
    """A picture or video, encoded, and its caption.

    data: the bytes of the file, or its local path. start, end: of the clip, in seconds; None: from the start, to the
    end. min_size: least width and height that the decoded frames must have; 0 where nothing is left to check.
    """

    key: str
    data: bytes | str
    caption: str
    start: float | None = None
    end: float | None = None
    min_size: int = 0


def admit(
    source: Images | Videos,
    key: str,
    data: bytes | str,
    fields: Fields,
    start: float | None = None,
    end: float | None = None,
    caption: str | None = None,
) -> MediaItem | Rejection:
    """The item, if it has a caption and passes the source's filters. caption: the clip's own; without, the record's."""
    try:
        text = _caption(source.caption, key, fields) if caption is None else _checked(key, caption)
        if isinstance(text, Rejection):
            return text
        size = _size(fields)
        if size is not None and min(size) < source.min_size:
            return Rejection(key, "filtered: min_size", f"{size[0]:g} x {size[1]:g}; wanted {source.min_size} or more")
        filtered = _filtered(source.where, key, Fields({"caption": text}, fields.find))
        if filtered is not None:
            return filtered
    except UnreadableField as error:
        return Rejection(key, *error.args)
    return MediaItem(key, data, text, start, end, source.min_size if size is None else 0)


def _filtered(where: str | None, key: str, fields: Fields) -> Rejection | None:
    try:
        if where is None or _condition(where)(fields):
            return None
    except KeyError as error:
        return Rejection(key, "missing field", f"where: no value of {error.args[0]}")
    except (TypeError, RecursionError) as error:
        return Rejection(key, "wrong field", f"where: {error}")
    return Rejection(key, "filtered: where", where)


_condition: Callable[[str], Condition] = lru_cache(maxsize=64)(parse_where)


def _caption(name: str | None, key: str, fields: Fields) -> str | Rejection:
    names = CAPTION_FIELDS if name is None else (name,)
    for candidate in names:
        value = fields.find(candidate)
        if isinstance(value, str) and value.strip():
            return _checked(key, value)
        if value is not None and not isinstance(value, str):
            return Rejection(key, "wrong field", f"{candidate}: got {type(value).__name__}; wanted a caption")
    return Rejection(key, "no caption", f"no words in {', '.join(names)}")


def _checked(key: str, text: str) -> str | Rejection:
    text = text.removeprefix("\ufeff").strip()
    if not text:
        return Rejection(key, "no caption", "no words in it")
    if len(text) > MAX_CAPTION or len(text.encode("utf-8", "surrogatepass")) > MAX_CAPTION:
        return Rejection(key, "caption too long", f"{len(text):,} characters; wanted {MAX_CAPTION:,} bytes or fewer")
    if holds_half_a_pair(text):
        return Rejection(key, "not UTF-8", "the caption has half of a surrogate pair")
    return text


def _size(fields: Fields) -> tuple[float, float] | None:
    """Width and height: the original's where a downloader noted them, else the file's; None where none did."""
    for names in (("original_width", "original_height"), ("width", "height")):
        width, height = (fields.find(name) for name in names)
        if _is_length(width) and _is_length(height):
            return width, height
    return None


def _is_length(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < MAX_SIDE


def is_text_first(order: Order, seed: int, source_name: str, key: str) -> bool:
    """Whether the caption comes before the pixels; `random` is drawn from (seed, source, key) alone."""
    if order != "random":
        return order == "text-first"
    return bool(hashlib.sha256(json.dumps([seed, source_name, key]).encode()).digest()[0] & 1)


def media_runs(
    tokenizer: TextTokenizer,
    caption: str,
    codes: Int32[np.ndarray, "frames 256"],
    text_first: bool,
    train: Literal["both", "last"],
) -> tuple[Run, ...]:
    """BOS, caption and vision block in their order, EOS; trained but for BOS and, of `last`, what comes first."""
    is_first_trained = train == "both"
    bos, end = text_runs(tokenizer, [], eos=True)
    text = Run(tokenizer.encode(caption), is_vision=False, trained=is_first_trained or not text_first)
    vision = vision_runs(tokenizer, codes, trained=is_first_trained or text_first)
    return (bos, text, *vision, end) if text_first else (bos, *vision, text, end)
