"""When the next request may be sent: what the server's headers say, and how long to wait after a failure.

Retry-After: 20                                  or an HTTP date
x-ratelimit-remaining-requests: 0                with x-ratelimit-reset-requests: 1m30.5s, 250ms or 12 (seconds)
x-ratelimit-remaining-tokens: 120                the same for tokens: too few for another request of the usual size
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

LONGEST = 3600.0  # seconds; a server that asks for more is asked again after them
TELL_EVERY = 5.0  # seconds between two notes that all wait
FIRST = 0.5  # seconds before the second attempt
PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|h|m|s)")
SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that `Retry-After` asks for; `now` is the wall clock. None where it says nothing."""
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", value):
        return min(float(value), LONGEST)
    try:
        when = parsedate_to_datetime(value)
        when = when if when.tzinfo else when.replace(tzinfo=UTC)
        return min(max((when - datetime.fromtimestamp(now, UTC)).total_seconds(), 0.0), LONGEST)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def duration(value: str) -> float | None:
    """Seconds that `1m30.5s`, `250ms` or `12` stand for."""
    value = value.strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", value):
        return min(float(value), LONGEST)
    parts = PART.findall(value)
    if not parts or "".join(number + unit for number, unit in parts) != value:
        return None
    return min(sum(float(number) * SECONDS[unit] for number, unit in parts), LONGEST)


def exhausted(headers: Mapping[str, str], tokens: float) -> float | None:
    """Seconds until a request of `tokens` tokens fits again, where the headers say that none does now."""
    waits = []
    for name, needed in (("requests", 1.0), ("tokens", tokens)):
        remaining = headers.get(f"x-ratelimit-remaining-{name}", "")
        reset = duration(headers.get(f"x-ratelimit-reset-{name}", ""))
        if reset is not None and remaining.isdigit() and float(remaining) < needed:
            waits.append(reset)
    return max(waits) if waits else None


def backoff(attempt: int, longest: float, draw: random.Random) -> float:
    """Seconds to wait after the attempt of this number, from 1: doubling, and drawn, so that clients do not march."""
    most = min(FIRST * 2.0 ** min(attempt - 1, 30), longest)
    return draw.uniform(most / 2, most)


class Pause:
    """Holds back all requests while the server says so; not one of them asks by itself. tell: seconds that are left."""

    def __init__(self, tell: Callable[[float], None]) -> None:
        self._until, self._tell = 0.0, tell

    def extend(self, seconds: float) -> None:
        """No request for so long."""
        self._until = max(self._until, time.monotonic() + seconds)

    async def wait(self) -> None:
        """Return once requests may be sent."""
        while (left := self._until - time.monotonic()) > 0:
            if left > TELL_EVERY:
                self._tell(left)
            await asyncio.sleep(min(left * random.uniform(1.0, 1.05) + 0.001, TELL_EVERY))
