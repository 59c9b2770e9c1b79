"""Which frames a vision tokenizer is trained on, and that no file is left out or cut in silence."""

from __future__ import annotations

import dataclasses
import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lwm_data import vision_training
from lwm_data.sources.images import PICTURE
from lwm_data.vision_training import read_training_frames
from tests.tiny_vision import gradients

BLACK = np.zeros((256, 256, 3), np.uint8)


def _picture(pixels: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def test_a_file_that_is_too_large_is_counted_and_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loose, packed or in a tar; one of exactly the limit is taken. A bitmap that is cut would still be a picture."""
    small, large = _picture(gradients(1)[0], "PNG"), _picture(BLACK, "BMP")
    limit = len(small)
    assert len(large) > limit
    kind = dataclasses.replace(PICTURE, max_bytes=limit)
    monkeypatch.setattr(vision_training, "PICTURE", kind)
    (tmp_path / "a.png").write_bytes(small)
    (tmp_path / "b.bmp").write_bytes(large)
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        for name, data in (("d.png", small), ("e.bmp", large)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = read_training_frames([str(tmp_path / "*")], fps=1.0, max_frames=1, keep_out=0)
    np.testing.assert_array_equal(found.trained, np.concatenate([gradients(1)] * 2))
    assert len(found.kept_out) == 0
    assert found.rejected == Counter({"too large": 2})
