"""Which vision tokenizer: the spec in `tokenizers/*.yaml`, and what names it. Imports no torch.

demo-vision.yaml                      demo-vision.safetensors
  weights: demo-vision.safetensors ->   tensors, named as taming's VQModel names them
  sha256: of that file                      |
  dtype: fp32                               |
  config: {ch: 32, ...}                     |
      \\___________ fingerprint ____________/    equal fingerprints: the same codes for the same pixels
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lwm_data.format.atomic import write_whole
from lwm_data.format.manifest import ManifestModel, ManifestPath, quoted, read_manifest
from lwm_data.format.vocab import EOF

NUM_LEVELS = 5  # four halvings: 256 pixels to 16 codes
FACTOR = 1 << (NUM_LEVELS - 1)
RESOLUTION = 256  # pixels of a side; 16 x 16 codes of 16 x 16 pixels are the 256 codes of a frame
VERSIONS = {"fp32": 1, "bf16": 3}  # of the way from pixels to codes; another way of rounding, another number
MAX_CHANNELS = 2048  # of the widest level: 16 times 128, above every published model
CHUNK = 1 << 20  # bytes


class VQGANConfig(ManifestModel):
    """Sizes of a VQGAN, named as taming-transformers' `ddconfig` names them. Frozen and hashable.

    Bounded, so that a spec from elsewhere cannot ask for more memory than a few of the largest published models.
    """

    ch: int = Field(
        default=32, ge=32, le=512, multiple_of=32, description="width of the first level; GroupNorm has 32 groups"
    )
    ch_mult: tuple[Annotated[int, Field(ge=1, le=16)], ...] = Field(
        default=(1, 1, 2, 2, 4),
        description="width of each level / ch; five levels, so that a code covers 16 x 16 pixels",
    )
    num_res_blocks: int = Field(
        default=1, ge=1, le=4, description="residual blocks per encoder level; a decoder's has one more"
    )
    attn_resolutions: tuple[Annotated[int, Field(ge=1, le=64)], ...] = Field(
        default=(),
        max_length=4,
        description="sides of the feature maps that attention follows; 64 at most, its cost is side^4",
    )
    mid_attention: bool = Field(
        default=True, description="attention between the two middle blocks, as taming has; LWM has none"
    )
    z_channels: int = Field(default=64, ge=1, le=1024, description="channels of the encoder's output")
    embed_dim: int = Field(default=64, ge=1, le=1024, description="length of a code's vector")
    num_codes: int = Field(default=8192, ge=2, le=EOF, description="taming's n_embed; ids from 8192 on are EOF and EOV")
    resolution: int = Field(
        default=RESOLUTION, ge=FACTOR, le=RESOLUTION, multiple_of=FACTOR, description="pixels of a side"
    )

    @field_validator("ch_mult")
    @classmethod
    def _five_levels(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(value) != NUM_LEVELS:
            raise ValueError(f"{NUM_LEVELS} numbers, so that a code covers {FACTOR} x {FACTOR} pixels")
        return value

    @model_validator(mode="after")
    def _width(self) -> VQGANConfig:
        if (widest := self.ch * max(self.ch_mult)) > MAX_CHANNELS:
            raise ValueError(f"at most {MAX_CHANNELS} channels; ch times the largest of ch_mult is {widest}")
        return self

    @property
    def grid(self) -> int:
        """Codes of a side: 16 at 256 pixels."""
        return self.resolution // FACTOR


class AboutTokenizer(ManifestModel):
    """What training measured; says nothing of the codes, so it is not in the fingerprint."""

    psnr: float | None = Field(default=None, description="dB, of reconstructions of the training pictures")
    codes_used: int | None = Field(default=None, ge=0, description="different codes over the training pictures")
    heldout_psnr: float | None = Field(
        default=None, description="dB, of reconstructions of pictures kept out of training"
    )
    heldout_codes_used: int | None = Field(default=None, ge=0, description="different codes over those")
    note: str = ""


class VisionTokenizerSpec(ManifestModel):
    """`tokenizers/*.yaml`: which VQGAN weights, what they must be, and how they are computed with."""

    kind: Literal["vision_tokenizer"] = "vision_tokenizer"
    name: str
    weights: ManifestPath = Field(description="the .safetensors file, its tensors named as taming's VQModel names them")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of the weights file")
    dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="what most is computed in; bf16 gives a few other codes"
    )
    config: VQGANConfig
    about: AboutTokenizer | None = None

    @field_validator("config")
    @classmethod
    def _frame(cls, value: VQGANConfig) -> VQGANConfig:
        if value.resolution != RESOLUTION:
            raise ValueError(f"resolution {RESOLUTION}; a frame is 16 x 16 codes")
        return value


def vision_tokenizer_fingerprint(spec: VisionTokenizerSpec) -> str:
    """Equal for two specs exactly when they mean the same codes: weights, sizes and dtype; not name, place or note."""
    version = VERSIONS[spec.dtype]
    parts = {"version": version, "weights": spec.sha256, "dtype": spec.dtype, "config": spec.config.model_dump()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_vision_tokenizer_spec(path: str | Path) -> VisionTokenizerSpec:
    """The spec at `path`, its weights file found and hashed. ValueError where that is not the one promised."""
    spec = read_manifest(path, {"vision_tokenizer": VisionTokenizerSpec})
    assert isinstance(spec, VisionTokenizerSpec)
    weights = Path(spec.weights)
    if not weights.is_file():
        raise ValueError(f"{path}: weights: no such file: {weights}")
    if (got := file_sha256(weights)) != spec.sha256:
        raise ValueError(
            f"{path}: sha256: {weights.name} has {got}, the spec wants {spec.sha256}; restore the weights file, or "
            "correct the spec and rebuild every dataset made with it"
        )
    return spec


def write_vision_tokenizer_spec(spec: VisionTokenizerSpec, path: Path, comment: str = "") -> None:
    """Write `spec` to `path`, its weights named relative to it; `comment` is the file's first line.

    Call it when the weights file is there: a spec is the sign that a tokenizer is whole.
    """
    weights = os.path.relpath(spec.weights, path.parent)
    config = spec.config.model_dump(mode="json")
    lines = [f"# {comment}"] * bool(comment)
    lines += ["kind: vision_tokenizer", f"name: {quoted(spec.name)}", f"weights: {quoted(weights)}"]
    lines += [f"sha256: {spec.sha256}", f"dtype: {spec.dtype}", "config:"]
    lines += [f"  {key}: {json.dumps(value)}" for key, value in config.items()]
    if spec.about is not None:
        about = spec.about.model_dump(mode="json", exclude_none=True)
        lines += ["about:"]
        lines += [f"  {key}: {quoted(v) if isinstance(v, str) else json.dumps(v)}" for key, v in about.items()]
    write_whole(path, "\n".join(lines) + "\n")


def save_vision_tokenizer(spec: VisionTokenizerSpec, folder: Path) -> None:
    """Copy `vision_tokenizer.safetensors` and its spec `vision_tokenizer.yaml` to `folder`, each whole or not at all.

    ValueError where the weights are no longer those that `spec` was read with.
    """
    weights = folder / "vision_tokenizer.safetensors"
    if not (weights.is_file() and file_sha256(weights) == spec.sha256):
        temporary = weights.with_name(f".{weights.name}.tmp")
        shutil.copyfile(spec.weights, temporary)
        if (got := file_sha256(temporary)) != spec.sha256:
            temporary.unlink()
            raise ValueError(f"{spec.weights}: sha256 is now {got}, was {spec.sha256}; it changed while it was in use")
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, weights)
    copy = spec.model_copy(update={"weights": str(weights)})
    write_vision_tokenizer_spec(copy, folder / "vision_tokenizer.yaml")


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()
