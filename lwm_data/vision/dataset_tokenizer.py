"""The vision tokenizer that a dataset carries, from a folder or any store. Torch comes in only when it is asked for.

index.json                     vision_tokenizer_fingerprint: 3f0c...   (none: a dataset without vision)
vision_tokenizer.yaml          whose fingerprint must be that
vision_tokenizer.safetensors
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec

from lwm_data.format.dataset import Dataset

if TYPE_CHECKING:
    from lwm_data.vision.vqgan import VisionTokenizer

SPEC, WEIGHTS = "vision_tokenizer.yaml", "vision_tokenizer.safetensors"


def dataset_vision_tokenizer(dataset: Dataset) -> VisionTokenizer | None:
    """The tokenizer that lies in the dataset's folder; None where the index names none, or it is not there.

    ValueError where it is not the index's, is damaged, or what computes with it is not installed.
    """
    wanted = dataset.info.vision_tokenizer_fingerprint
    if wanted is None:
        return None
    if "://" in dataset.url:
        with tempfile.TemporaryDirectory() as folder:
            try:
                for name in (SPEC, WEIGHTS):
                    with fsspec.open(f"{dataset.url}/{name}", "rb") as source, open(Path(folder) / name, "wb") as copy:
                        shutil.copyfileobj(source, copy, 1 << 20)
            except FileNotFoundError:
                return None
            tokenizer = _load(dataset, Path(folder) / SPEC)
    else:
        spec = Path(dataset.url) / SPEC
        if not spec.is_file():
            return None
        tokenizer = _load(dataset, spec)
    if tokenizer.fingerprint != wanted:
        raise ValueError(
            f"{dataset.url}: {SPEC} is not the vision tokenizer this dataset was built with "
            f"(got {tokenizer.fingerprint[:12]}, the index wants {wanted[:12]})"
        )
    return tokenizer


def _load(dataset: Dataset, spec: Path) -> VisionTokenizer:
    try:
        from lwm_data.vision.vqgan import load_vision_tokenizer
    except ImportError as error:
        raise ValueError(
            f"{dataset.url}: pictures need {error.name}, which is not installed: pip install 'lwm[vision]', or "
            "`make setup`"
        ) from error
    return load_vision_tokenizer(spec)
