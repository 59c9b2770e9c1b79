"""A vision tokenizer small enough for tests, of random weights, and datasets that carry it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from lwm_data.format.dataset import Dataset, open_dataset, write_index
from lwm_data.vision.spec import (
    VisionTokenizerSpec,
    VQGANConfig,
    file_sha256,
    read_vision_tokenizer_spec,
    save_vision_tokenizer,
    vision_tokenizer_fingerprint,
    write_vision_tokenizer_spec,
)
from lwm_data.vision.vqgan import VQGAN

TINY = VQGANConfig.model_validate(
    {"ch": 32, "ch_mult": [1, 1, 1, 1, 1], "mid_attention": False, "z_channels": 8, "embed_dim": 4, "num_codes": 500}
)


def write_tiny_tokenizer(path: Path, seed: int = 0) -> VisionTokenizerSpec:
    """Write `path` (.yaml) and its weights beside it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VQGAN(TINY)
        torch.nn.init.normal_(model.quantize.embedding.weight)  # as it is made, all codes are almost the same
    weights = path.with_suffix(".safetensors")
    save_file(model.state_dict(), weights)
    spec = VisionTokenizerSpec(
        name=path.stem, weights=str(weights), sha256=file_sha256(weights), dtype="fp32", config=TINY
    )
    write_vision_tokenizer_spec(spec, path)
    return read_vision_tokenizer_spec(path)


def with_tokenizer(dataset: Dataset, spec: VisionTokenizerSpec) -> Dataset:
    """`dataset`, a local folder, as a build with vision leaves it."""
    folder = Path(dataset.url)
    save_vision_tokenizer(spec, folder)
    changed = {"vision_tokenizer_fingerprint": vision_tokenizer_fingerprint(spec)}
    write_index(folder, dataset.info.model_copy(update=changed))
    return open_dataset(folder)


def gradients(count: int) -> np.ndarray:
    """uint8[count, 256, 256, 3]: pictures that differ from each other, and from place to place."""
    y, x = np.mgrid[0:256, 0:256]
    return np.stack([np.stack([x, y, (x + y + 40 * i) % 256], axis=-1) for i in range(count)]).astype(np.uint8)
