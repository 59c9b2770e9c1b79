"""Files on a disk that stand whole or not at all: written to a temporary name, synced, renamed.

.shard-000000.tar.3f0c....tmp     locked while it is written, so that what the dead left is known from the rest
shard-000000.tar                  whole
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that stands at `path` only once the block has ended well; fsynced, then renamed.

    While it is written the temporary is locked, so that `remove_leftovers` takes only those of the dead.
    """
    # Process numbers repeat: builds in two containers, or on two machines, may share a folder.
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    with _open_locked(temporary) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _open_locked(path: Path) -> BinaryIO:
    while True:
        file = open(path, "wb")  # noqa: SIM115 (the caller closes it)
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # another build took it for a leftover between the two calls


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporaries in `folder` that nobody is writing any more."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
