"""Which documents are held out: a function of a document's key and the split's seed, and of nothing else.

    sha256(seed, key) as a number from 0 to 1:   0 |-- heldout --|------------ train ------------| 1
                                                               split.heldout

So two datasets, one of each side, share no document, in whatever order and under whatever source name it is read.
What is held out at 1% is held out at 2% as well.
"""

from __future__ import annotations

import hashlib
import json
import re

from lwm_data.manifest_sources import Split
from lwm_data.sources.record import Rejection

PACKED = re.compile(r"\.(?:gz|zst)(?=[:/]|$)")  # a file that is packed holds the same documents


def is_heldout(split: Split, key: str) -> bool:
    """Whether the document called `key` is held out."""
    digest = hashlib.sha256(json.dumps([split.seed, PACKED.sub("", key)]).encode()).digest()
    return int.from_bytes(digest[:8], "big") < split.heldout * 2.0**64


def other_side(split: Split | None, key: str) -> Rejection | None:
    """The rejection of a document that is not of the side that is wanted."""
    if split is None or is_heldout(split, key) == (split.take == "heldout"):
        return None
    return Rejection(key, "filtered: split", f"of the other side (take: {split.take})")
