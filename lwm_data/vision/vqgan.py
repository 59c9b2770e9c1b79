"""Pixels to VQGAN codes and back, on taming-transformers' modules.

    pixels           uint8[n, 256, 256, 3]
      x / 127.5 - 1    float[n, 3, 256, 256]   -1 .. 1
      encoder          float[n, z, 16, 16]     four halvings
      quant_conv       float[n, e, 16, 16]
      nearest vector   int32[n, 256]           row by row; index of the nearest of num_codes vectors, squared L2
      codes
      its vector       float[n, e, 16, 16]
      post_quant_conv  float[n, z, 16, 16]
      decoder          float[n, 3, 256, 256]   clipped to -1 .. 1
      (y + 1) * 127.5  uint8[n, 256, 256, 3]   truncated, as the LWM release does

Letters: n pictures, z `z_channels`, e `embed_dim`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32, UInt8
from safetensors import SafetensorError, safe_open
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.vqvae.quantize import VectorQuantizer2
from torch import Tensor, nn

from lwm_data.vision.layers import halve_branches, use_own_layers
from lwm_data.vision.spec import (
    VisionTokenizerSpec,
    VQGANConfig,
    read_vision_tokenizer_spec,
    vision_tokenizer_fingerprint,
)

COMMITMENT = 0.25
DEVICE_BATCH = 16  # pictures at once on a GPU
SEARCH_ROWS = 4096  # vectors compared with the codebook at once: distances take 128 MiB at 8192 codes


class VQGAN(nn.Module):
    """taming's VQModel without Lightning: its `state_dict` has the same keys. Weights are random until loaded."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        sizes = {
            "ch": config.ch,
            "out_ch": 3,
            "ch_mult": config.ch_mult,
            "num_res_blocks": config.num_res_blocks,
            "attn_resolutions": config.attn_resolutions,
            "in_channels": 3,
            "resolution": config.resolution,
            "z_channels": config.z_channels,
        }
        with contextlib.redirect_stdout(io.StringIO()):  # taming prints its shapes
            self.encoder = Encoder(double_z=False, **sizes)
            self.decoder = Decoder(**sizes)
        if not config.mid_attention:
            self.encoder.mid.attn_1 = nn.Identity()
            self.decoder.mid.attn_1 = nn.Identity()
        use_own_layers(self)
        self.quantize = VectorQuantizer2(config.num_codes, config.embed_dim, beta=COMMITMENT)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def vectors(self, pixels_BCHW: Tensor) -> Tensor:
        """float[n, 3, h, w] in -1..1 to float[n, e, h / 16, w / 16], not yet quantized."""
        encoded_BZHW: Tensor = self.encoder(pixels_BCHW)
        vectors_BEHW: Tensor = self.quant_conv(encoded_BZHW)
        return vectors_BEHW

    def pixels(self, vectors_BEHW: Tensor) -> Tensor:
        """float[n, e, h, w] to float[n, 3, 16 h, 16 w], not yet clipped."""
        pixels_BCHW: Tensor = self.decoder(self.post_quant_conv(vectors_BEHW))
        return pixels_BCHW

    def codes(self, vectors_BEHW: Tensor) -> Tensor:
        """int64[n, h * w]: the nearest codebook vector at each place, row by row; the first of equals.

        Distances as taming and the release write them, |v|^2 + |c|^2 - 2 v.c, in float32 whatever the model's dtype.
        """
        codebook_KE = self.quantize.embedding.weight.float()
        norms_K = (codebook_KE**2).sum(1)
        vectors_NE = vectors_BEHW.float().permute(0, 2, 3, 1).reshape(-1, codebook_KE.shape[1])
        found = []
        for piece_NE in torch.split(vectors_NE, SEARCH_ROWS):
            norms_N1 = (piece_NE**2).sum(1, keepdim=True)
            distances_NK = norms_N1 + norms_K - 2 * (piece_NE @ codebook_KE.T)
            found.append(distances_NK.min(1).indices)  # argmin takes twice as long
        return torch.cat(found).reshape(len(vectors_BEHW), -1)


class VisionTokenizer:
    """A VQGAN with the spec it was loaded by: pictures to codes and back, as numpy arrays.

    On a CPU each picture is computed alone and on one thread, several pictures side by side. That is the fastest way
    there, and a picture's codes then depend neither on its neighbours nor on the number of threads: the kernels that
    torch picks for another batch or another number of threads round in another order.
    """

    def __init__(self, spec: VisionTokenizerSpec, model: VQGAN, device: str = "cpu") -> None:
        self.spec = spec
        self.fingerprint = vision_tokenizer_fingerprint(spec)
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        nn.Module.to(model, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if spec.dtype == "bf16":
            halve_branches(model.encoder)
            for part in (model.post_quant_conv, model.decoder):  # no codes hang on these
                nn.Module.to(part, torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def encode(self, pixels: UInt8[np.ndarray, "n 256 256 3"]) -> Int32[np.ndarray, "n 256"]:
        """Codes of `pixels`. ValueError for another shape or dtype."""
        side, grid = self.spec.config.resolution, self.spec.config.grid
        if pixels.ndim != 4 or pixels.shape[1:] != (side, side, 3) or pixels.dtype != np.uint8:
            raise ValueError(f"pixels: got {pixels.dtype}{list(pixels.shape)}; wanted uint8[n, {side}, {side}, 3]")
        codes = np.empty((len(pixels), grid * grid), np.int32)
        self._in_batches(self._encode, pixels, codes)
        return codes

    def decode(self, codes: Int32[np.ndarray, "n 256"]) -> UInt8[np.ndarray, "n 256 256 3"]:
        """Pictures of `codes`. ValueError for ids that are no codes of this tokenizer, as EOF and EOV are."""
        side, grid, num_codes = self.spec.config.resolution, self.spec.config.grid, self.spec.config.num_codes
        if codes.ndim != 2 or codes.shape[1] != grid * grid or codes.dtype.kind not in "iu":
            raise ValueError(f"codes: got {codes.dtype}{list(codes.shape)}; wanted int32[n, {grid * grid}]")
        if codes.size and (codes.min() < 0 or codes.max() >= num_codes):
            raise ValueError(f"codes: got {codes.min()} to {codes.max()}; wanted 0 to {num_codes - 1}")
        pixels = np.empty((len(codes), side, side, 3), np.uint8)
        self._in_batches(self._decode, codes.astype(np.int64), pixels)
        return pixels

    def _encode(self, pixels_BHWC: Tensor) -> Tensor:
        inputs = pixels_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1  # channels-last, as the pixels lie
        return self.model.codes(self.model.vectors(inputs)).int()

    def _decode(self, codes: Tensor) -> Tensor:
        grid = self.spec.config.grid
        vectors_BEHW = self.model.quantize.embedding(codes.reshape(-1, grid, grid)).permute(0, 3, 1, 2)
        outputs = self.model.pixels(vectors_BEHW.to(self.model.post_quant_conv.weight.dtype)).float()
        return ((outputs.clamp(-1, 1) + 1) * 127.5).to(torch.uint8).permute(0, 2, 3, 1)

    def _in_batches(self, compute: Callable[[Tensor], Tensor], inputs: np.ndarray, outputs: np.ndarray) -> None:
        """outputs[i] = compute(inputs[i]); one at a time on a CPU, else in batches of one size, the last one padded."""
        size = 1 if self.device.type == "cpu" else DEVICE_BATCH

        @torch.inference_mode()
        def run(at: int) -> None:
            piece = inputs[at : at + size]
            padded = np.concatenate([piece, np.repeat(piece[-1:], size - len(piece), axis=0)])
            outputs[at : at + size] = compute(torch.from_numpy(padded).to(self.device)).cpu().numpy()[: len(piece)]

        starts = range(0, len(inputs), size)
        with true_float32():
            if self.device.type != "cpu":
                for at in starts:
                    run(at)
            elif starts:
                num_threads = torch.get_num_threads()
                num_workers = min(num_threads, len(starts))
                with ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                    list(pool.map(run, starts))
                torch.set_num_threads(num_threads)  # the workers set the default of later threads too


@contextlib.contextmanager
def true_float32() -> Iterator[None]:
    """Neither TF32 nor bfloat16 where float32 is asked for, no kernels chosen by speed, whatever the process set."""
    backends = torch.backends
    kinds = (
        (backends.cuda, "matmul"),
        (backends.cudnn, "conv"),
        (backends.mkldnn, "matmul"),
        (backends.mkldnn, "conv"),
    )
    wanted: list[tuple[Any, str, Any]] = [(getattr(part, kind), "fp32_precision", "ieee") for part, kind in kinds]
    wanted += [(backends.cudnn, "deterministic", True), (backends.cudnn, "benchmark", False)]
    before = [getattr(place, name) for place, name, _ in wanted]
    try:
        for place, name, value in wanted:
            setattr(place, name, value)
        yield
    finally:
        for (place, name, _), value in zip(wanted, before, strict=True):
            setattr(place, name, value)


def weight_shapes(config: VQGANConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor that weights of `config` must have; takes no memory for them."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in VQGAN(config).state_dict().items()}


def load_vision_tokenizer(spec_path: str | Path, device: str = "cpu") -> VisionTokenizer:
    """The tokenizer that the YAML file `spec_path` names.

    ValueError where the weights file is not the one promised, is no safetensors file, or does not fit the sizes.
    """
    spec = read_vision_tokenizer_spec(spec_path)
    wanted = weight_shapes(spec.config)
    try:
        with safe_open(spec.weights, "pt") as file:
            got = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, not a dict
            _check_shapes(f"{spec_path}: weights: {Path(spec.weights).name}", got, wanted)
            state = {name: file.get_tensor(name).float() for name in wanted}
    except SafetensorError as error:
        raise ValueError(
            f"{spec_path}: weights: {Path(spec.weights).name} is not a safetensors file: {error}; "
            "`lwm-data tokenizer import-vision` makes one of other formats"
        ) from error
    with torch.device("meta"):
        model = VQGAN(spec.config)
    model.load_state_dict(state, assign=True)
    return VisionTokenizer(spec, model, device)


def _check_shapes(where: str, got: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    for name, shape in wanted.items():
        if name not in got:
            raise ValueError(f"{where} has no tensor {name}; `config` asks for {len(wanted)}, the file has {len(got)}")
        if got[name] != shape:
            raise ValueError(f"{where}: {name} is {list(got[name])}, `config` makes it {list(shape)}; correct one")
    if extra := sorted(set(got) - set(wanted)):
        raise ValueError(f"{where}: {extra[0]} and {len(extra) - 1} more tensors that `config` has no place for")
