"""lwm-train with a dataset whose storage stops answering: `hang://PATH` serves REQUESTS ranges, then none.

python hanging_run.py REQUESTS ARGUMENTS OF lwm-train
"""

from __future__ import annotations

import sys
import time

import fsspec
from fsspec.implementations.local import LocalFileSystem

left = int(sys.argv[1])


class Hanging(LocalFileSystem):
    """A local disk that hangs after a while."""

    protocol = "hang"

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: object) -> bytes:
        global left
        left -= 1
        while left < 0:
            time.sleep(1)
        data: bytes = super().cat_file(path, start=start, end=end, **kwargs)
        return data

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = LocalFileSystem._strip_protocol(path.removeprefix("hang://"))
        return stripped


if __name__ == "__main__":
    from lwm_data.terminal import run_app
    from lwm_train.cli import app

    fsspec.register_implementation("hang", Hanging)
    sys.exit(run_app(app, sys.argv[2:]))
