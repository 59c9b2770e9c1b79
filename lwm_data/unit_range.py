"""One share of a build's units of encoding and tokenizing, for a job of many that work side by side.

units   0 1 2 3 4 5 6 7 8 9
1/3     *     *     *     *      dealt out in turn, so that sources and sizes spread over the jobs
2/3       *     *     *
3/3         *     *     *
4:7             * * *            from 4 up to, not with, 7
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class UnitRange:
    """start, stop, step: as of Python's ranges; stop None: to the last. text: as the user wrote it."""

    text: str
    start: int
    stop: int | None
    step: int

    def of(self, num_units: int) -> range:
        """The numbers of its units. The shares 1/N to N/N hold every unit exactly once.

        ValueError where units are named that there are none of.
        """
        if self.stop is not None and self.start >= num_units > 0:
            raise ValueError(f"--unit-range: got {self.text}; there are {num_units:,} units, 0 to {num_units - 1}")
        return range(num_units)[self.start : self.stop : self.step]


def parse_unit_range(text: str) -> UnitRange:
    """`3/16` is the third of 16 shares; `40:80` are the units 40 to 79, counted from 0. ValueError for another form."""
    if match := re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text):
        share, num_shares = int(match[1]), int(match[2])
        if 1 <= share <= num_shares:
            return UnitRange(text, share - 1, None, num_shares)
    if match := re.fullmatch(r"([0-9]{1,12}):([0-9]{1,12})", text):
        start, stop = int(match[1]), int(match[2])
        if start < stop:
            return UnitRange(text, start, stop, 1)
    raise ValueError(
        f"--unit-range: got {text}; wanted a share such as 3/16 (1/16 is the first), or units such as 40:80"
    )
