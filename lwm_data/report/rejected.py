"""rejected.jsonl as a page shows it: the first records of each reason, of each source.

{"source": "talk", "key": "2e9f69ec", "reason": "longer than a row", "detail": "2,269 tokens; row_length is 2,048"}
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lwm_data.report.page_text import shown
from lwm_data.sources.files import InputFile
from lwm_data.sources.json_lines import JsonLine, read_json_lines
from lwm_data.sources.record import Rejection
from lwm_data.work_folder import REJECTED

PER_REASON = 20
LISTED = 1_000  # in all
LINES = 1_000_000  # read


@dataclass(frozen=True)
class RejectedRecord:
    """What rejected.jsonl says of a record, ready for the page."""

    source: str
    key: str
    reason: str
    detail: str


@dataclass(frozen=True)
class RejectedList:
    """records: some of each reason. is_cut: whether the file has more lines than were looked at."""

    records: list[RejectedRecord]
    num_read: int
    is_cut: bool


def read_rejected(url: str) -> RejectedList:
    """The first PER_REASON records of each source and reason; none where there is no such file."""
    records: list[RejectedRecord] = []
    seen: Counter[tuple[str, str]] = Counter()
    num_read = 0
    for line in _lines(f"{url}/{REJECTED}"):
        if num_read >= LINES:
            return RejectedList(records, num_read, True)
        num_read += 1
        found: Any = line.value if isinstance(line, JsonLine) else None
        if not isinstance(found, dict):  # the file is not of use to a build; the list says so and goes on
            found = {"source": "", "key": line.key, "reason": "not a line of rejected.jsonl", "detail": ""}
        record = RejectedRecord(
            shown(found.get("source")), shown(found.get("key")), shown(found.get("reason")), shown(found.get("detail"))
        )
        seen[record.source, record.reason] += 1
        if seen[record.source, record.reason] <= PER_REASON and len(records) < LISTED:
            records.append(record)
    return RejectedList(records, num_read, False)


def _lines(path: str) -> Iterator[JsonLine | Rejection]:
    with contextlib.suppress(FileNotFoundError):  # it need not be there
        yield from read_json_lines(InputFile(path, REJECTED))
