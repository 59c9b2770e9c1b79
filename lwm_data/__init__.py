"""Books, images, videos, chats and question-answer pairs as packed training shards."""

from lwm_data.format.dataset import Dataset, open_dataset

__all__ = ["Dataset", "open_dataset"]
