"""Pictures and videos of one unit of input to codes: read, decode in child processes, encode in batches.

    files -> MediaItem -> request -> frames -> batch of frames -> codes -> code_store
             sources      decode_pool          vision.vqgan

What is already coded in a file of the same codes (other filters, the same pixels) is taken from there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch

from lwm_data.code_store import Coded, CodeFile, write_codes
from lwm_data.folder import Folder
from lwm_data.manifest_sources import Images, Videos
from lwm_data.sources.files import check_unchanged
from lwm_data.sources.images import read_images
from lwm_data.sources.key_index import SeenKeys
from lwm_data.sources.media import MediaItem
from lwm_data.sources.record import Rejection
from lwm_data.sources.unit import Unit
from lwm_data.sources.videos import read_videos
from lwm_data.vision.decode_pool import DecodePool, Failure, ImageRequest, VideoRequest
from lwm_data.vision.vqgan import VisionTokenizer, load_vision_tokenizer

FRAMES = 64  # encoded at a time
STRETCH = 4096  # items that are read before the last of them is given out; most may be filtered rows
PICTURE_SECONDS = 60.0  # of a processor, that decoding may take
VIDEO_SECONDS = 3600.0


@dataclass(frozen=True)
class Encoding:
    """store: the token store. vision_tokenizer: path of the spec, and what its fingerprint must be.

    cores: of the worker.
    """

    store: Folder
    vision_tokenizer: str
    fingerprint: str
    cores: int


def encode_unit(shared: Encoding, unit: Unit) -> int:
    """Write the unit's file of codes; returns its frames. ValueError where a file is not what was hashed."""
    source = unit.source
    assert isinstance(source, Images | Videos)
    torch.set_num_threads(shared.cores)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # of the worker: the build may run where there is no GPU
    tokenizer = _tokenizer(shared.vision_tokenizer, shared.fingerprint, device)
    # A GPU takes frames faster than two processes decode them; on a CPU the model is the slower side by far.
    decoders = max(2, shared.cores) if device == "cuda" else 2
    items = read_images(source, unit.files) if isinstance(source, Images) else read_videos(source, unit.files)
    seconds = PICTURE_SECONDS if isinstance(source, Images) else VIDEO_SECONDS
    same = unit.codes.rpartition("-")[0] + "-"
    names = sorted(name for name in shared.store.sizes() if name.startswith(same) and name.endswith(".arrow"))
    known = [CodeFile(shared.store.fetch(name)) for name in names]

    def coded() -> Iterator[Coded | Rejection]:
        with DecodePool(decoders, seconds_per_item=seconds) as pool:
            yield from encode_items(source, items, pool, tokenizer, known)
        for file in unit.files:
            check_unchanged(file)

    with shared.store.writing() as folder:
        return write_codes(folder / unit.codes, coded())


@lru_cache(maxsize=1)  # units of one build have one tokenizer
def _tokenizer(spec: str, fingerprint: str, device: str) -> VisionTokenizer:
    tokenizer = load_vision_tokenizer(spec, device)
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(f"{spec}: changed while it was in use; build again once nothing writes to it")
    return tokenizer


@dataclass
class _Pending:
    """An item between its reading and its codes. known: where they are; rejection: why there are none."""

    key: str
    caption: str = ""
    known: tuple[CodeFile, tuple[int, int]] | None = None
    rejection: Rejection | None = None
    codes: list[np.ndarray] = field(default_factory=list)
    done: bool = False

    def result(self) -> Coded | Rejection:
        if self.rejection is not None:
            return self.rejection
        codes = self.known[0].codes(self.known[1]) if self.known else np.concatenate(self.codes).astype(np.uint16)
        return Coded(self.key, self.caption, codes)


def encode_items(
    source: Images | Videos,
    items: Iterable[MediaItem | Rejection],
    pool: DecodePool,
    tokenizer: VisionTokenizer,
    known: list[CodeFile],
) -> Iterator[Coded | Rejection]:
    """The items' results in their order, of which at most STRETCH are read and not yet given out."""
    places = {key: (file, place) for file in known for key, place in file.places().items()}
    seen = SeenKeys()
    rest = iter(items)
    for item in rest:
        stretch = chain((item,), islice(rest, STRETCH - 1))
        yield from _encode_stretch(source, stretch, pool, tokenizer, places, seen)


def _encode_stretch(
    source: Images | Videos,
    items: Iterable[MediaItem | Rejection],
    pool: DecodePool,
    tokenizer: VisionTokenizer,
    places: Mapping[str, tuple[CodeFile, tuple[int, int]]],
    seen: SeenKeys,
) -> Iterator[Coded | Rejection]:
    pending: deque[_Pending] = deque()  # all that are read and not given out
    asked: dict[int, _Pending] = {}  # by the request's number
    batch: list[tuple[_Pending, np.ndarray, bool]] = []  # frames to encode, and whether they are the item's last

    def requests() -> Iterator[ImageRequest | VideoRequest]:
        number = 0
        for item in items:
            if isinstance(item, MediaItem) and not seen.add(item.key):
                item = Rejection(item.key, "duplicate key", "an earlier record of the unit has it")
            if isinstance(item, Rejection):
                pending.append(_Pending(item.key, rejection=item, done=True))
            elif item.key in places and not item.min_size:  # codes do not tell how large the picture was
                pending.append(_Pending(item.key, item.caption, known=places[item.key], done=True))
            else:
                asked[number] = _Pending(item.key, item.caption)
                pending.append(asked[number])
                number += 1
                yield _request(source, item)

    def encode() -> None:
        codes = tokenizer.encode(np.concatenate([frames for _, frames, _ in batch]))
        at = 0
        for owner, frames, is_last in batch:
            owner.codes.append(codes[at : at + len(frames)])
            owner.done = is_last
            at += len(frames)
        batch.clear()

    for result in pool.decode(requests()):
        owner = asked[result.item]
        if isinstance(result, Failure):
            owner.rejection = Rejection(owner.key, result.reason, result.detail)
            owner.done = True
            batch[:] = [entry for entry in batch if entry[0] is not owner]
            del asked[result.item]
        else:
            batch.append((owner, result.frames, result.last))
            if result.last:
                del asked[result.item]
            if sum(len(frames) for _, frames, _ in batch) >= FRAMES:
                encode()
        while pending and pending[0].done:
            yield pending.popleft().result()
    if batch:
        encode()
    assert all(entry.done for entry in pending), "an item without a result"
    for entry in pending:
        yield entry.result()


def _request(source: Images | Videos, item: MediaItem) -> ImageRequest | VideoRequest:
    if isinstance(source, Images):
        data = item.data if isinstance(item.data, bytes) else Path(item.data).read_bytes()
        return ImageRequest(data, item.min_size)
    return VideoRequest(item.data, source.fps, source.max_frames, item.start, item.end, source.decoder, item.min_size)
