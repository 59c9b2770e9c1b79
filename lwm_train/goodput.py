"""Where a run's wall time went, over all its starts: RUN/goodput.json.

    {"sessions": [{"began": 1790000000.0, "start": s, "restore": s, "compile": s, "wait": s, "train": s, "save": s,
                   "evaluate": s, "redone": s, "wall": s}, ...]}

compile: a start's first step, which is compiled. wait: of steps for data. redone: training of earlier sessions whose
steps were lost with them, and are done again by this one. Time between two sessions is in none of them.

    goodput = (train - redone) / (now - began of the first session)

The file is written every few seconds, so a kill loses no more of the account than that.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, Literal

from lwm_data.format.atomic import write_whole

GOODPUT = "goodput.json"
EVERY = 5.0  # seconds between writes
Kind = Literal["start", "restore", "compile", "wait", "train", "save", "evaluate"]


class Goodput:
    """The account of one session. `lap` puts down the time since the lap before."""

    def __init__(self, run: Path, is_writer: bool) -> None:
        self._path, self._is_writer = run / GOODPUT, is_writer
        self._sessions = read_sessions(run)
        self._began = self._last = time.monotonic()
        self._session: dict[str, float] = {"began": time.time(), "redone": 0.0, "wall": 0.0}
        self._sessions.append(self._session)
        self._written = -EVERY

    def lap(self, kind: Kind) -> float:
        """Seconds since the lap before; they were spent on `kind`."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._session[kind] = self._session.get(kind, 0.0) + seconds
        self._session["wall"] = now - self._began
        if self._is_writer and now - self._written > EVERY:
            self.write()
        return seconds

    def redo(self, seconds: float) -> None:
        """So much training of earlier sessions is done again."""
        self._session["redone"] += seconds

    def share(self) -> float:
        """The run's goodput so far, 0 to 1."""
        return goodput_share(self._sessions)

    def write(self) -> None:
        """Write the account, whole."""
        self._written = time.monotonic()
        rounded = [{key: round(value, 3) for key, value in session.items()} for session in self._sessions]
        write_whole(self._path, json.dumps({"sessions": rounded}, indent=1) + "\n")


def read_sessions(run: Path) -> list[dict[str, float]]:
    """The sessions of a run; none where it has no account or not one of ours."""
    try:
        content: Any = json.loads((run / GOODPUT).read_text(encoding="utf-8"))
        return [{str(key): float(value) for key, value in session.items()} for session in content["sessions"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # an account is not worth a run
        return []


def goodput_share(sessions: list[dict[str, float]]) -> float:
    """Seconds of training that counted, over those since the first session began; 0 of no session."""
    if not sessions:
        return 0.0
    wall = sessions[-1].get("began", 0.0) + sessions[-1].get("wall", 0.0) - sessions[0].get("began", 0.0)
    counted = math.fsum(session.get("train", 0.0) - session.get("redone", 0.0) for session in sessions)
    return max(0.0, counted / wall) if wall > 0 else 0.0
