"""This machine's scratch for builds from and to URLs; all of it may be deleted while no build runs.

TMPDIR/lwm-1000/writing-3f0c.../shard-000000.tar   on its way to a URL; gone afterwards, the next build removes
                                                   what a killed one left
TMPDIR/lwm-1000/fetched/91ab.../novels-3f0c.arrow  a copy of a file behind a URL, for all workers; the ones not
                                                   used for longest go when there are too many bytes, and what a
                                                   killed download left goes with the next one
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

from lwm_data.whole_file import remove_leftovers

SHARE_OF_DISK = 0.5  # of what is free, that fetched files may take
IN_USE = 60.0  # seconds for which a fetched file stays, so that whoever asked for it can open it


def scratch_root() -> Path:
    """The user's scratch folder. ValueError where somebody else has made it."""
    root = Path(tempfile.gettempdir()) / f"lwm-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    if root.is_symlink() or root.stat().st_uid != os.getuid():
        raise ValueError(f"{root}: belongs to another user; set TMPDIR to a folder of your own")
    return root


@contextlib.contextmanager
def writing_folder() -> Iterator[Path]:
    """An empty folder that goes when the block ends; it is locked until then."""
    folder, descriptor = _locked_folder()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _locked_folder() -> tuple[Path, int]:
    while True:
        folder = scratch_root() / f"writing-{uuid4().hex}"
        folder.mkdir()
        with contextlib.suppress(FileNotFoundError):  # taken for a leftover between the calls
            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if folder.exists():
                return folder, descriptor
            os.close(descriptor)


def remove_dead_writing() -> None:
    """Remove the folders of `writing_folder` whose processes were killed."""
    for folder in scratch_root().glob("writing-*"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def fetched(identity: str, name: str, num_bytes: int, download: Callable[[Path], None]) -> Path:
    """The file `name` on this disk; `download` writes it where it is not there, once for all processes that ask.

    identity: what tells one content from another.
    """
    cache = scratch_root() / "fetched"
    path = cache / hashlib.sha256(identity.encode()).hexdigest()[:32] / name
    temporary = path.with_name(f".{name}.tmp")  # one name, so that a killed download leaves no second one
    while not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked_file(temporary) as is_held:
            if is_held and not path.exists():  # nobody has fetched it while we waited
                _make_room(cache, num_bytes)
                download(temporary)
                if (got := temporary.stat().st_size) != num_bytes:
                    raise OSError(f"{name}: {got:,} of {num_bytes:,} bytes came")
                with open(temporary, "rb") as written:
                    os.fsync(written.fileno())
                os.replace(temporary, path)
    os.utime(path)
    return path


@contextlib.contextmanager
def _locked_file(path: Path) -> Iterator[bool]:
    """Make the file `path` and lock it; whether it is still the one of that name when our turn comes."""
    try:
        file = open(path, "ab")  # noqa: SIM115 (closed below)
    except FileNotFoundError:  # its folder was removed a moment ago
        yield False
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            is_held = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except FileNotFoundError:
            is_held = False
        yield is_held


def _make_room(cache: Path, num_bytes: int) -> None:
    """Remove what killed downloads left, then what was not used for longest, until `num_bytes` more are within the
    bound."""
    for folder in cache.iterdir():
        with contextlib.suppress(OSError):  # it holds something, or went in the meantime
            remove_leftovers(folder)
            folder.rmdir()
    files = []
    for path in cache.glob("*/*.arrow"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            files.append((status.st_mtime, status.st_size, path))
    used = sum(size for _, size, _ in files)
    bound = SHARE_OF_DISK * (shutil.disk_usage(cache).free + used)
    now = time.time()
    for modified, size, path in sorted(files):
        if used + num_bytes <= bound or now - modified < IN_USE:
            return
        with contextlib.suppress(OSError):
            path.unlink()
            path.parent.rmdir()
        used -= size
