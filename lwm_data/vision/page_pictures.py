"""Vision blocks of a page's rows as pictures within it: few, small, decoded only where they are drawn.

tokens of a block -> some frames of it -> strip -> JPEG in a data: address
                     FRAMES               HEIGHT   MAX_PICTURES of them in a page: a megabyte or two
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lwm_data.format.dataset import Dataset
from lwm_data.vision.dataset_tokenizer import dataset_vision_tokenizer
from lwm_data.vision.pictures import data_uri, decode_block, strip

if TYPE_CHECKING:
    from lwm_data.vision.vqgan import VisionTokenizer

FRAMES = 8  # of a video
HEIGHT = 128  # pixels; the page shows them at 96, so that they are sharp on fine screens
MAX_PICTURES = 40


class Pictures:
    """The pictures of one page, `most` or fewer. problems: why there are none of a dataset, for the page."""

    def __init__(self, most: int = MAX_PICTURES) -> None:
        self.problems: dict[str, str] = {}
        self._left = most
        self._tokenizers: dict[str | None, VisionTokenizer | None] = {}

    def picture(self, dataset: Dataset, tokens: np.ndarray) -> str | None:
        """The address of a strip of the block's frames; None where it cannot be drawn, or enough are."""
        if not self._left or dataset.info.name in self.problems:
            return None
        fingerprint = dataset.info.vision_tokenizer_fingerprint
        try:
            if fingerprint not in self._tokenizers:
                self._tokenizers[fingerprint] = dataset_vision_tokenizer(dataset)
            tokenizer = self._tokenizers[fingerprint]
            if tokenizer is None:
                raise ValueError("the vision tokenizer of its codes is not in its folder")
            frames = decode_block(tokens, tokenizer, FRAMES)
        except (ValueError, OSError) as error:
            self.problems[dataset.info.name] = str(error)
            return None
        if not len(frames):
            return None
        self._left -= 1
        return data_uri(strip(frames, height=HEIGHT))
