"""Training a VQGAN: the same call gives the same bytes, stopped or not; it learns; codes are used and then stand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lwm_data.sources.tar_members import read_members
from lwm_data.vision import train_vqgan, trainer
from lwm_data.vision.frames import decode_image
from lwm_data.vision.spec import VQGANConfig, read_vision_tokenizer_spec
from lwm_data.vision.train_vqgan import Recipe, psnr, train_vision_tokenizer
from lwm_data.vision.trainer import Trainer, reconstruction_loss
from lwm_data.vision.vqgan import load_vision_tokenizer

ROOT = Path(__file__).parents[3]
TINY = VQGANConfig(ch=32, ch_mult=(1, 1, 1, 1, 1), mid_attention=False, z_channels=8, embed_dim=4, num_codes=256)


@pytest.fixture(scope="module")
def photos() -> np.ndarray:
    """uint8[6, 256, 256, 3]: photographs of the demo."""
    with open(ROOT / "manifests/demo/photos/00001.tar", "rb") as tar:
        members = read_members(tar, lambda name: 1 << 24 if name.endswith(".jpg") else None)
        return np.stack([decode_image(member.data) for member in members if member.data][:6])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads that share their cores with another worker's wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small crops, and a state kept after each step."""
    monkeypatch.setattr(trainer, "CROP", 64)
    monkeypatch.setattr(trainer, "CROPS", 2)
    monkeypatch.setattr(train_vqgan, "SAVE_EVERY", 0.0)


@pytest.mark.usefixtures("narrow")
def test_a_stopped_training_goes_on_to_the_same_bytes(
    tmp_path: Path, photos: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(config=TINY, steps=7, seed=3)
    made = []
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        out = tmp_path / name / "tiny.yaml"
        if name == "stopped":
            advance = Trainer.advance

            def stop_at_five(self: Trainer, advance=advance) -> float:  # type: ignore[no-untyped-def]
                if self.step == 5:
                    raise KeyboardInterrupt
                return float(advance(self))

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(Trainer, "advance", stop_at_five)
                train_vision_tokenizer(photos[:2], out, recipe, photos[2:3], "the command")
            assert [path.name for path in out.parent.iterdir()] == [".tiny.training"]  # no half tokenizer
            with pytest.raises(ValueError, match=r"\.tiny\.training is of other pictures or settings; .* remove it"):
                train_vision_tokenizer(photos[:1], out, recipe)
        tokenizer = train_vision_tokenizer(photos[:2], out, recipe, photos[2:3], "the command")
        assert sorted(path.name for path in out.parent.iterdir()) == ["tiny.safetensors", "tiny.yaml"]
        made.append([out.read_bytes(), out.with_suffix(".safetensors").read_bytes()])
    assert made[0] == made[1]
    assert made[0][0].startswith(b"# the command\n")
    spec = read_vision_tokenizer_spec(out)
    assert spec == tokenizer.spec and spec.about is not None
    back = tokenizer.decode(codes := tokenizer.encode(photos[:2]))
    assert spec.about.psnr == round(psnr(photos[:2], back), 2)
    assert spec.about.codes_used == len(np.unique(codes))
    assert spec.about.heldout_psnr == round(psnr(photos[2:3], tokenizer.decode(tokenizer.encode(photos[2:3]))), 2)
    assert load_vision_tokenizer(out).fingerprint == tokenizer.fingerprint


def test_real_pictures_are_learned(photos: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "CROP", 64)
    monkeypatch.setattr(trainer, "WARMUP", 5)
    training = Trainer(photos, Recipe(config=TINY, steps=60))
    pixels = torch.from_numpy(photos[:, 64:192, 64:192]).permute(0, 3, 1, 2).contiguous() / 127.5 - 1

    def loss() -> float:
        with torch.inference_mode():
            return float(reconstruction_loss(training.model.pixels(training.model.vectors(pixels)), pixels, 1.0))

    before = loss()
    for _ in range(20):
        training.advance()
    assert loss() < 0.8 * before


def test_in_the_last_phase_only_the_decoder_moves(photos: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "CROP", 64)
    training = Trainer(photos, Recipe(config=TINY, steps=7))
    while training.step < 6:  # 0.85 of 7
        training.advance()
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    training.advance()
    for name, tensor in training.model.state_dict().items():
        part = name.split(".")[0]
        if part in ("encoder", "quant_conv"):
            assert torch.equal(tensor, before[name].bfloat16().float()), name
        elif part == "quantize":
            assert torch.equal(tensor, before[name])
        else:
            assert not torch.equal(tensor, before[name]), name


def test_codes_that_nothing_uses_are_put_on_vectors_of_the_batch(photos: np.ndarray) -> None:
    training = Trainer(photos, Recipe(config=TINY, steps=10))
    torch.manual_seed(0)
    vectors = torch.randn(2, TINY.embed_dim, 8, 8)
    with torch.no_grad():  # one code near everything, all others far away
        training.codebook.fill_(1e3)
        training.codebook[7] = 0
        training.uses.fill_(1e-6)
        training.sums.copy_(training.codebook * 1e-6)
    used = []
    for step in range(12):
        codes = training.model.codes(vectors).reshape(2, 8, 8)
        used.append(len(codes.unique()))
        training._move_codebook(vectors, codes, np.random.default_rng(step))
    assert used[0] == 1 and used[-1] > 100
    assert training.codebook[training.model.codes(vectors).flatten()].abs().max() < 10


def test_wrong_pictures_and_names_are_refused(tmp_path: Path, photos: np.ndarray) -> None:
    with pytest.raises(ValueError, match=re.escape("--out: got x.safetensors; wanted a name that ends in .yaml")):
        train_vision_tokenizer(photos, Path("x.safetensors"))
    with pytest.raises(ValueError, match=re.escape("pixels: got [6, 128, 256, 3]; wanted [n, 256, 256, 3]")):
        train_vision_tokenizer(photos[:, :128], tmp_path / "x.yaml")
    with pytest.raises(ValueError, match="n above 0"):
        train_vision_tokenizer(photos[:0], tmp_path / "x.yaml")


def test_psnr_is_that_of_its_definition() -> None:
    black = np.zeros((2, 4, 4, 3), np.uint8)
    grey = black.copy()
    grey[0], grey[1] = 1, 16
    assert psnr(black, grey) == pytest.approx((20 * np.log10(255) + 20 * np.log10(255 / 16)) / 2)
