"""Pictures in memory to a vision tokenizer on disk, in steps that can be stopped and gone on with.

.mine.training        state of the training, every minute; the same call goes on from it, the end removes it
mine.safetensors      encoder in bfloat16, decoder in float16, codebook in float32
mine.yaml             the spec, written last: sizes, sha256, and what was measured with these very files
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from jaxtyping import UInt8

from lwm_data.format.atomic import write_whole
from lwm_data.terminal import Progress
from lwm_data.vision.spec import (
    RESOLUTION,
    AboutTokenizer,
    VisionTokenizerSpec,
    file_sha256,
    write_vision_tokenizer_spec,
)
from lwm_data.vision.trainer import Recipe as Recipe
from lwm_data.vision.trainer import Trainer
from lwm_data.vision.vqgan import VisionTokenizer, load_vision_tokenizer

DEMO_RECIPE = Recipe()
SAVE_EVERY = 60.0  # seconds
STORED = {"encoder": torch.bfloat16, "quant_conv": torch.bfloat16, "quantize": torch.float32}


def train_vision_tokenizer(
    pixels: UInt8[np.ndarray, "n 256 256 3"],
    out: Path,
    recipe: Recipe = DEMO_RECIPE,
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
        try:
            state = torch.load(saved, weights_only=True)
        except Exception as error:  # torch raises what the damage leads to
            raise ValueError(f"{saved} cannot be read: {error}; remove it to start anew") from error
        if state.pop("identity") != identity:
            raise ValueError(f"{saved} is of other pictures or settings; give those again, or remove it to start anew")
        trainer.restore(state)
    with Progress("train-vision", total=recipe.steps, unit="steps") as progress:
        progress.advance(trainer.step)
        last = time.monotonic()
        while trainer.step < recipe.steps:
            loss = trainer.advance()
            if not math.isfinite(loss):
                raise ValueError(f"the loss is {loss} at step {trainer.step}; lower the learning rate")
            progress.advance(1, f"loss {loss:.3f}")
            if time.monotonic() - last > SAVE_EVERY:
                temporary = saved.with_name(f"{saved.name}.tmp")
                torch.save(trainer.state() | {"identity": identity}, temporary)
                os.replace(temporary, saved)
                last = time.monotonic()
    weights = out.with_suffix(".safetensors")
    tensors = {
        name: tensor.to(STORED.get(name.split(".")[0], torch.float16)).contiguous()
        for name, tensor in trainer.model.state_dict().items()
    }
    write_whole(weights, safetensors.torch.save(tensors))
    spec = VisionTokenizerSpec(name=out.stem, weights=str(weights), sha256=file_sha256(weights), config=recipe.config)
    write_vision_tokenizer_spec(spec, out, comment)
    about = measure(load_vision_tokenizer(out), pixels, heldout, note)
    write_vision_tokenizer_spec(spec.model_copy(update={"about": about}), out, comment)
    saved.unlink(missing_ok=True)
    return load_vision_tokenizer(out)


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
