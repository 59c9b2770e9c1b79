"""Trains a small VQGAN on a few hundred pictures, on a CPU, in four phases.

    share of steps   0 ...... 0.1 ............ 0.65 ......... 0.85 .......... 1
    pictures         crops of 128 x 128          | whole, 256 x 256
    codebook         none    | drawn from vectors, then their running mean | frozen
    what learns      everything                                | the decoder

Half the sides cost a quarter, and the model is convolutional, so most steps see crops; but GroupNorm takes its means
over a whole picture, so the last ones must see whole pictures. A code that no vector was near for long is put on a
vector of the batch. In the last phase codes stand still, and the decoder learns to draw them: before it, the encoder
is rounded to the bfloat16 that it is stored in, so that it has the same weights when it computes in bfloat16.

The batch of a step is a function of (seed, step): the same call gives the same bytes, stopped and resumed or not.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import UInt8
from torch import Tensor

from lwm_data.format.atomic import write_whole
from lwm_data.terminal import Progress
from lwm_data.vision.spec import (
    RESOLUTION,
    AboutTokenizer,
    VisionTokenizerSpec,
    VQGANConfig,
    file_sha256,
    write_vision_tokenizer_spec,
)
from lwm_data.vision.vqgan import COMMITMENT, VQGAN, VisionTokenizer, load_vision_tokenizer

DEMO_CONFIG = VQGANConfig(mid_attention=False, embed_dim=8)
CROP = 128  # pixels
CROPS = 4  # of a batch, as many pixels as one whole picture
QUANTIZE, WHOLE, DECODER_ONLY = 0.1, 0.65, 0.85  # share of the steps at which the phase begins
WARMUP = 100  # steps
DECAY = 0.99  # of a code's running mean, per step
DEAD = 0.1  # a code used less than this share of the mean use is put elsewhere: at mean use, 1 in 1,000 by bad luck
MAX_RESTARTS = 64  # codes put elsewhere in one step
SAVE_EVERY = 60.0  # seconds


@dataclass(frozen=True)
class Recipe:
    """What the result depends on beside the pictures."""

    config: VQGANConfig = DEMO_CONFIG
    steps: int = 10_000
    seed: int = 0
    learning_rate: float = 1e-3
    gradient_weight: float = 1.0


class Trainer:
    """Model, optimizer, running means of the codebook, and the step they are at."""

    def __init__(self, pixels: UInt8[np.ndarray, "n 256 256 3"], recipe: Recipe) -> None:
        self.pixels = pixels
        self.recipe = recipe
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.model = VQGAN(recipe.config)
        self.codebook = self.model.quantize.embedding.weight.requires_grad_(False)
        self.uses = torch.zeros(recipe.config.num_codes)
        self.sums = torch.zeros_like(self.codebook)
        learned = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learned, recipe.learning_rate, betas=(0.9, 0.95), weight_decay=1e-4)
        self.step = 0

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "uses": self.uses,
            "sums": self.sums,
            "step": self.step,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.uses, self.sums, self.step = state["uses"], state["sums"], state["step"]

    def advance(self) -> float:
        """Take one step; its loss."""
        recipe, share = self.recipe, self.step / self.recipe.steps
        rng = np.random.default_rng([recipe.seed, self.step])
        target = self._batch(rng, whole=share >= WHOLE)
        rate = (
            recipe.learning_rate
            * min(1.0, (self.step + 1) / WARMUP)
            * (0.02 + 0.98 * math.cos(share * math.pi / 2) ** 2)
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if share >= QUANTIZE and not self.uses.any():
            self._start_codebook(rng)
        frozen = share >= DECODER_ONLY
        if frozen:
            self._round_encoder()
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(not frozen):
                vectors = self.model.vectors(target).float()
            commitment = torch.zeros(())
            if share >= QUANTIZE:
                codes = self._nearest(vectors)
                nearest = self.codebook[codes].permute(0, 3, 1, 2).contiguous()
                commitment = (vectors - nearest).square().mean() / nearest.square().mean()
                if not frozen:
                    self._move_codebook(vectors.detach(), codes, rng)
                vectors = vectors + (nearest - vectors).detach()
            output = self.model.pixels(vectors).float()
        loss = reconstruction_loss(output, target, recipe.gradient_weight)
        total = loss if frozen else loss + COMMITMENT * commitment
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def _batch(self, rng: np.random.Generator, whole: bool) -> Tensor:
        """float[n, 3, side, side]: random crops, half of them mirrored."""
        side = self.pixels.shape[1] if whole else min(CROP, self.pixels.shape[1])
        crops = []
        for _ in range(1 if whole else CROPS):
            picture = self.pixels[rng.integers(len(self.pixels))]
            y, x = rng.integers(0, picture.shape[0] - side + 1, 2)
            crop = picture[y : y + side, x : x + side]
            crops.append(crop[:, ::-1] if rng.integers(2) else crop)
        planes = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()  # see GroupNorm's backward above
        return planes.float() / 127.5 - 1

    @torch.no_grad()
    def _round_encoder(self) -> None:
        for part in (self.model.encoder, self.model.quant_conv):
            for weight in part.parameters():
                weight.copy_(weight.bfloat16())

    @torch.no_grad()
    def _nearest(self, vectors: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.model.codes(vectors.detach()).reshape(len(vectors), *vectors.shape[2:])

    @torch.no_grad()
    def _start_codebook(self, rng: np.random.Generator) -> None:
        """Put each code on a vector of a picture."""
        num_codes = len(self.codebook)
        with torch.autocast("cpu", torch.bfloat16):
            found: list[Tensor] = []
            while sum(map(len, found)) < num_codes:
                vectors = self.model.vectors(self._batch(rng, whole=False)).float()
                found.append(vectors.permute(0, 2, 3, 1).reshape(-1, self.codebook.shape[1]))
        drawn = torch.cat(found)[:num_codes]
        self.codebook.copy_(drawn)
        mean_use = found[0].shape[0] / num_codes
        self.uses.fill_(mean_use)
        self.sums.copy_(drawn * mean_use)

    @torch.no_grad()
    def _move_codebook(self, vectors: Tensor, codes: Tensor, rng: np.random.Generator) -> None:
        """Each code towards the mean of the vectors nearest to it; unused ones onto vectors of this batch."""
        flat = vectors.permute(0, 2, 3, 1).reshape(-1, self.codebook.shape[1])
        places = codes.reshape(-1)
        self.uses.mul_(DECAY).index_add_(0, places, torch.full((len(flat),), 1 - DECAY))
        self.sums.mul_(DECAY).index_add_(0, places, flat, alpha=1 - DECAY)
        mean_use = float(self.uses.sum()) / len(self.uses)
        dead = torch.nonzero(self.uses < DEAD * mean_use)[:MAX_RESTARTS, 0]
        chosen = flat[torch.from_numpy(rng.permutation(len(flat))[: len(dead)])]
        self.uses[dead[: len(chosen)]] = mean_use
        self.sums[dead[: len(chosen)]] = chosen * mean_use
        self.codebook.copy_(self.sums / self.uses.clamp_min(1e-8)[:, None])


def train_vision_tokenizer(
    pixels: UInt8[np.ndarray, "n 256 256 3"],
    out: Path,
    recipe: Recipe = Recipe(),
    heldout: UInt8[np.ndarray, "m 256 256 3"] | None = None,
    comment: str = "",
    note: str = "",
) -> VisionTokenizer:
    """Train on `pixels`; write `out` (.yaml) and its weights (.safetensors, half precision) beside it.

    heldout: pictures that it is measured on and never sees. comment: the first line of the spec, the command that
    made it. Every minute all is kept in `.NAME.training` beside `out`; the same call goes on from there, and the end
    removes it. Neither Ctrl-C nor a crash leaves half a tokenizer. ValueError for what cannot be trained on.
    """
    if out.suffix != ".yaml":
        raise ValueError(f"--out: got {out}; wanted a name that ends in .yaml (the weights go beside it)")
    if pixels.ndim != 4 or pixels.shape[1:] != (RESOLUTION, RESOLUTION, 3) or not len(pixels):
        raise ValueError(f"pixels: got {list(pixels.shape)}; wanted [n, {RESOLUTION}, {RESOLUTION}, 3] and n above 0")
    saved = out.with_name(f".{out.stem}.training")
    trainer = Trainer(pixels, recipe)
    identity = hashlib.sha256(repr(recipe).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()
    if saved.is_file():
        state = torch.load(saved, weights_only=True)
        if state.pop("identity") != identity:
            raise ValueError(f"{saved} is of other pictures or settings; give those again, or remove it to start anew")
        trainer.restore(state)
    with Progress("train-vision", total=recipe.steps, unit="steps") as progress:
        progress.advance(trainer.step)
        last = time.monotonic()
        while trainer.step < recipe.steps:
            loss = trainer.advance()
            progress.advance(1, f"loss {loss:.3f}")
            if time.monotonic() - last > SAVE_EVERY:
                temporary = saved.with_name(f"{saved.name}.tmp")
                torch.save(trainer.state() | {"identity": identity}, temporary)
                os.replace(temporary, saved)
                last = time.monotonic()
    weights = out.with_suffix(".safetensors")
    stored = {"encoder": torch.bfloat16, "quant_conv": torch.bfloat16, "quantize": torch.float32}
    tensors = {
        name: tensor.to(stored.get(name.split(".")[0], torch.float16)).contiguous()
        for name, tensor in trainer.model.state_dict().items()
    }
    write_whole(weights, safetensors.torch.save(tensors))
    spec = VisionTokenizerSpec(name=out.stem, weights=str(weights), sha256=file_sha256(weights), config=recipe.config)
    write_vision_tokenizer_spec(spec, out, comment)
    about = measure(load_vision_tokenizer(out), pixels, heldout, note)
    write_vision_tokenizer_spec(spec.model_copy(update={"about": about}), out, comment)
    saved.unlink(missing_ok=True)
    return load_vision_tokenizer(out)


def reconstruction_loss(output: Tensor, target: Tensor, gradient_weight: float) -> Tensor:
    """Mean absolute error, and that of the differences between neighbours at three scales: edges stay edges."""
    error = output - target
    loss = error.abs().mean() + error.square().mean()
    for _ in range(3):
        loss = loss + gradient_weight * (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()) / 2
        error = torch.nn.functional.avg_pool2d(error, 2)
    return loss


def psnr(pixels: UInt8[np.ndarray, "n h w 3"], other: UInt8[np.ndarray, "n h w 3"]) -> float:
    """Mean over pictures of 10 log10(255^2 / mean squared error), dB."""
    error = np.square(pixels.astype(np.float32) - other).mean(axis=(1, 2, 3), dtype=np.float64)
    return float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-12))))


def measure(
    tokenizer: VisionTokenizer,
    pixels: UInt8[np.ndarray, "n 256 256 3"],
    heldout: UInt8[np.ndarray, "m 256 256 3"] | None = None,
    note: str = "",
) -> AboutTokenizer:
    """PSNR of the reconstructions and how many different codes they take."""
    codes = tokenizer.encode(pixels)
    found = {"psnr": round(psnr(pixels, tokenizer.decode(codes)), 2), "codes_used": len(np.unique(codes))}
    if heldout is not None and len(heldout):
        codes = tokenizer.encode(heldout)
        found["heldout_psnr"] = round(psnr(heldout, tokenizer.decode(codes)), 2)
        found["heldout_codes_used"] = len(np.unique(codes))
    return AboutTokenizer.model_validate(found | {"note": note})
