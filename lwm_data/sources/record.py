"""What a source gives for each record: its runs, or why it was not taken.

Sources give whole records, however long; fit.py cuts them to rows, from lengths alone, so that tokenizing need
not be done again for another row length.
"""

from __future__ import annotations

from dataclasses import dataclass

from lwm_data.format.example import Run

UNREAD = "rest not read"  # the reason where the rest of a file is not read: more than one record may be lost


@dataclass(frozen=True)
class Record:
    """The tokens of one record. key: unique within its source, the same on every machine.

    note: (reason, detail) of what is told of a record that is taken all the same.
    """

    key: str
    runs: tuple[Run, ...]
    note: tuple[str, str] | None = None


@dataclass(frozen=True)
class Rejection:
    """A record that was not taken, or not whole. reason: one of few, to be counted; detail: for the person."""

    key: str
    reason: str
    detail: str
