"""Which errors of a file system behind a URL pass by themselves, and trying again until they do.

timeout, reset or refused connection, 5xx, 429     pass: try again, after 0.5 s, 1 s, 2 s, ...
403, 404, no credentials, no bucket, no package    stay: an error at once, and `refusal` says what to do
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 30.0)  # seconds between tries: an outage of 90 s costs no build
STAYING = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
STAYING_NUMBERS = {
    errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENOENT, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.EROFS
}  # fmt: skip
# By name, so that no package is imported for this; what is derived from them passes, too.
PASSING = {
    "aiohttp.client_exceptions.ClientError",
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.IncompleteReadError",
}


def retried(operation: Callable[[], Result], waits: tuple[float, ...] | None = None) -> Result:
    """The operation's result; errors that pass are waited for, the last one is raised. It must bear being repeated."""
    for wait in WAITS if waits is None else waits:
        try:
            return operation()
        except Exception as error:
            if not passes(error):
                raise
        time.sleep(wait)
    return operation()


def passes(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later."""
    status = getattr(error, "status", None)  # of aiohttp's answers
    if isinstance(status, int) and status:
        return status >= 500 or status in (408, 429)
    if isinstance(error, OSError):
        return not isinstance(error, STAYING) and error.errno not in STAYING_NUMBERS
    return bool({f"{of.__module__}.{of.__qualname__}" for of in type(error).__mro__} & PASSING)


def refusal(error: Exception, url: str, rights: str = "list, read, write and delete") -> ValueError:
    """What a person reads when `url` cannot be used: what came back, and the remedy. rights: that are needed there."""
    said = str(error).strip().split("\n")[0][:300] or type(error).__name__
    name = type(error).__name__
    if isinstance(error, ImportError):
        package = getattr(error.__cause__, "name", None)
        return ValueError(f"{url}: a package is missing: {f'pip install {package}' if package else said}")
    if isinstance(error, FileNotFoundError):
        return ValueError(f"{url}: {said}; no such bucket or folder: create it, or correct the URL")
    if isinstance(error, PermissionError) or "Credential" in name or getattr(error, "status", None) in (401, 403):
        return ValueError(
            f"{url}: {said}; access is refused: wanted credentials with the right to {rights} "
            "there, in the environment (of s3://: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
        )
    if isinstance(error, NotImplementedError):
        return ValueError(f"{url}: nothing can be written there; name a folder on disk, or of an object store")
    if passes(error):
        return ValueError(f"{url}: cannot be reached ({said}); check the network and the endpoint, or try again later")
    return ValueError(f"{url}: {said}")
