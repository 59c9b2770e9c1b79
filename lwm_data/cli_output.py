"""What the verbs of lwm-data print: views for a person, the same as JSON for a script."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from lwm_data.folder import Folder
    from lwm_data.format.dataset import DatasetInfo


def described(out: Folder | Path, info: DatasetInfo) -> dict[str, Any]:
    """A dataset for a script."""
    from lwm_data.summary import fill

    found = {"out": str(out), "fill": fill(info), "fingerprint": info.fingerprint}
    return found | info.model_dump(exclude={"manifest", "shards"})


def where(place: Folder | Path) -> str:
    """The shorter way to a path: from here, or from the root. A URL is its own."""
    path = str(place)
    if "://" in path:
        return path
    return min(os.path.relpath(path), os.path.normpath(path), key=len)


def print_view(renderable: object) -> None:
    """Print something of rich's."""
    view_console().print(renderable)


def view_console() -> Console:
    """The console that views go to; in a pipe wide enough that no number is cut."""
    from rich.console import Console

    console = Console(soft_wrap=False)
    return Console(width=console.width if console.is_terminal else max(console.width, 120))
