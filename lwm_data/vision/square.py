"""The one way from a picture of any size to the square that the tokenizer takes.

    +-----+-------+-----+      shorter side to 256 by PIL's default filter (bicubic), the other side floored,
    |     |       |     |      then the centre; half a pixel goes to the even one, as PIL's crop rounds.
    | cut | 256^2 | cut |
    +-----+-------+-----+

These are the values of the LWM release, for which rows are resampled before columns and rounded to 8 bits in between.
PIL 13 takes columns first in a tall picture (other values, by up to 12 levels), so each direction is asked for alone,
and most of what will be cut is not computed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

if TYPE_CHECKING:
    from PIL import Image

FRAME = 256  # pixels, width and height of a frame
MIN_SIDE = 16  # pixels; a tracking pixel or an icon has nothing to see
MAX_ASPECT = 20  # longer side over shorter; also bounds the resized picture: 256 x 5,120 pixels


def check_size(width: int, height: int, min_size: int = 0) -> None:
    """ValueError(reason, detail) where a picture of so many pixels makes no sensible square, or is below `min_size`."""
    if min(width, height) < MIN_SIDE:
        raise ValueError("too small", f"{width:,} x {height:,} pixels; wanted at least {MIN_SIDE} on each side")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError("too long and thin", f"{width:,} x {height:,} pixels; wanted at most {MAX_ASPECT} : 1")
    if min(width, height) < min_size:
        raise ValueError("filtered: min_size", f"{width:,} x {height:,} pixels; wanted {min_size:,} or more")


def to_square(image: Image.Image) -> UInt8[np.ndarray, "256 256 3"]:
    """The RGB `image`, of a size that check_size accepts, as a frame (read-only)."""
    short = min(image.size)
    left, (x0, x1), columns = _kept(image.width, FRAME * image.width // short)
    top, (y0, y1), rows = _kept(image.height, FRAME * image.height // short)
    image = image.resize((columns, image.height), box=(x0, 0, x1, image.height))
    image = image.resize((columns, rows), box=(0, y0, columns, y1))
    return np.asarray(image.crop((left, top, left + FRAME, top + FRAME)))


def _kept(full: int, resized: int) -> tuple[int, tuple[int, int], int]:
    """In one direction, from `full` pixels to `resized`: where the frame begins among the pixels that are computed,
    the source pixels that they are computed from, and their number.

    They begin and end where a source pixel does: PIL's box is float32, and a broken edge changes values by 1.
    """
    start = round((resized - FRAME) / 2)
    step = resized // math.gcd(full, resized)
    first = start // step * step
    end = -(-(start + FRAME) // step) * step
    return start - first, (first * full // resized, end * full // resized), end - first
