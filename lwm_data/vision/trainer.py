"""Trains a small VQGAN on a few hundred pictures, on a CPU, in four phases.

    share of steps   0 ...... 0.1 ............ 0.65 ......... 0.85 .......... 1
    pictures         crops of 128 x 128          | whole, 256 x 256
    codebook         none    | drawn from vectors, then their running mean | frozen
    what learns      everything                                | the decoder

Half the sides cost a quarter, and the model is convolutional, so most steps see crops; but GroupNorm takes its means
over a whole picture, so the last ones must see whole pictures. A code that no vector was near for long is put on a
vector of the batch. In the last phase codes stand still, and the decoder learns to draw them: before it, the encoder
is rounded to the bfloat16 that it is stored in, so that it has the same weights when it computes in bfloat16.

Muon moves all directions of a kernel alike; with AdamW the codes of the first 500 steps tell light from dark and little
else, since that is most of the error.

The batch of a step is a function of (seed, step): the same call gives the same bytes, stopped and resumed or not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from lwm_data.vision.spec import VQGANConfig
from lwm_data.vision.vqgan import COMMITMENT, VQGAN

DEMO_CONFIG = VQGANConfig(ch_mult=(2, 2, 2, 2, 4), mid_attention=False, embed_dim=8)
CROP = 128  # pixels
CROPS = 4  # of a batch, as many pixels as one whole picture
QUANTIZE, WHOLE, DECODER_ONLY = 0.1, 0.65, 0.85  # share of the steps at which the phase begins
WARMUP = 20  # steps
MOMENTUM, WEIGHT_DECAY = 0.9, 0.01  # of Muon
ADAM_SHARE = 0.05  # of Muon's learning rate, for norms and biases
COLOUR_WEIGHT = 2.0
DECAY = 0.99  # of a code's running mean, per step
DEAD = 0.1  # a code used less than this share of the mean use is put elsewhere: at mean use, 1 in 1,000 by bad luck
MAX_RESTARTS = 64  # codes put elsewhere in one step


@dataclass(frozen=True)
class Recipe:
    """What the result depends on beside the pictures."""

    config: VQGANConfig = DEMO_CONFIG
    steps: int = 10_000
    seed: int = 0
    learning_rate: float = 0.02  # of Muon
    gradient_weight: float = 1.0


class Trainer:
    """Model, optimizers, running means of the codebook, and the step they are at."""

    def __init__(self, pixels: UInt8[np.ndarray, "n 256 256 3"], recipe: Recipe) -> None:
        self.pixels = pixels
        self.recipe = recipe
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.model = VQGAN(recipe.config)
            start_as_pyramid(self.model)
        self.codebook = self.model.quantize.embedding.weight.requires_grad_(False)
        self.uses = torch.zeros(recipe.config.num_codes)
        self.sums = torch.zeros_like(self.codebook)
        learned = [p for p in self.model.parameters() if p.requires_grad]
        rest = [p for p in learned if p.ndim != 4]
        self.muon = Muon([p for p in learned if p.ndim == 4])
        self.adam = torch.optim.AdamW(rest, ADAM_SHARE * recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.step = 0

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "muon": self.muon.means,
            "adam": self.adam.state_dict(),
            "uses": self.uses,
            "sums": self.sums,
            "step": self.step,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.muon.means = state["muon"]
        self.adam.load_state_dict(state["adam"])
        self.uses, self.sums, self.step = state["uses"], state["sums"], state["step"]

    def advance(self) -> float:
        """Take one step; its loss."""
        recipe, share = self.recipe, self.step / self.recipe.steps
        rng = np.random.default_rng([recipe.seed, self.step])
        target = self._batch(rng, whole=share >= WHOLE)
        rate = min(1.0, (self.step + 1) / WARMUP) * (0.02 + 0.98 * math.cos(share * math.pi / 2) ** 2)
        for group in self.adam.param_groups:
            group["lr"] = rate * recipe.learning_rate * ADAM_SHARE
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
        self.model.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.muon.step(rate * recipe.learning_rate)
        self.adam.step()
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
        planes = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
        return (
            planes.float() / 127.5 - 1
        )  # as planes: torch's GroupNorm goes back through channels-last 20 times slower

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


class Muon:
    """Momentum, with the singular values of each kernel's step brought near 1: arXiv 2502.16982. torch's takes matrices
    alone."""

    def __init__(self, kernels: list[nn.Parameter]) -> None:
        self.kernels = kernels
        self.means = [torch.zeros_like(kernel) for kernel in kernels]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Move each kernel that has a gradient."""
        for kernel, mean in zip(self.kernels, self.means, strict=True):
            if kernel.grad is not None:
                mean.lerp_(kernel.grad, 1 - MOMENTUM)
                update = orthogonal(kernel.grad.lerp(mean, MOMENTUM).flatten(1))
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                kernel.mul_(1 - learning_rate * WEIGHT_DECAY)
                kernel.add_(update.view_as(kernel), alpha=-learning_rate * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """`matrix` with singular values between about 0.7 and 1.2, by five Newton-Schulz steps."""
    x: Tensor = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


@torch.no_grad()
def start_as_pyramid(model: VQGAN) -> None:
    """Set the weights so that levels average 2 x 2 pixels, or repeat them, and blocks add nothing yet.

    As torch makes them, each convolution without a way around it shrinks what passes, colours above all: after 50 steps
    colours are off by 30 of 255, as if there were none; from here by 20.
    """
    for name, module in model.named_modules():
        if name.endswith("downsample.conv"):
            channels = torch.arange(len(module.weight))
            torch.nn.init.zeros_(module.weight)[channels, channels, :2, :2] = 1 / 4
        elif name.endswith("upsample.conv"):
            torch.nn.init.dirac_(module.weight)
        elif name.endswith("nin_shortcut"):
            torch.nn.init.orthogonal_(module.weight)
        elif name.endswith(".conv2"):
            torch.nn.init.zeros_(module.weight)
        else:
            continue
        torch.nn.init.zeros_(module.bias)


def reconstruction_loss(output: Tensor, target: Tensor, gradient_weight: float) -> Tensor:
    """Error of pixels, of the differences between neighbours at three scales, and of colour at the coarsest.

    Differences keep edges edges. Colours vary less than light does and are learned last: so their error, what is left
    when a pixel's mean is taken off, counts again, in patches of 8 x 8.
    """
    error = output - target
    loss = error.abs().mean() + error.square().mean()
    for _ in range(3):
        loss = loss + gradient_weight * (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()) / 2
        error = torch.nn.functional.avg_pool2d(error, 2)
    colour = error - error.mean(1, keepdim=True)
    return loss + error.abs().mean() + COLOUR_WEIGHT * colour.abs().mean()
