"""Books, images, videos, chats and question-answer pairs as packed training shards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lwm_data.format.dataset import Dataset, open_dataset

__all__ = ["Dataset", "open_dataset"]


def __getattr__(name: str) -> Any:
    """The public names, imported when they are asked for, so that `lwm-data --help` waits for nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lwm_data.format import dataset

    return getattr(dataset, name)
