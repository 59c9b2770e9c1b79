"""Pictures to codes at the release's size: the plain loop beside ours, and what layout, batch and dtype each give.

plain       read, resize, crop, encode one picture after the other: taming's modules, float32, planes (NCHW)
rows after  one thing more each; `tokenizer` is `VisionTokenizer.encode`, one picture per thread
of peak     the encoder's multiplications and additions over the time, against a large matmul of the same dtype

Weights are random: time does not depend on them. The second table is of the demo tokenizer's size.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from taming.modules.diffusionmodules.model import Encoder
from torch import Tensor, nn

from lwm_data.vision.spec import VisionTokenizerSpec, VQGANConfig
from lwm_data.vision.trainer import DEMO_CONFIG
from lwm_data.vision.vqgan import VQGAN, VisionTokenizer

ROOT = Path(__file__).parents[1]
RELEASE = VQGANConfig(ch=128, ch_mult=(1, 2, 2, 4, 6), num_res_blocks=2, mid_attention=False)
BATCH = 8


def photographs(count: int) -> list[bytes]:
    """JPEG bytes of the demo's first photographs."""
    with tarfile.open(ROOT / "manifests/demo/photos/00000.tar") as tar:
        members = [member for member in tar if member.name.endswith(".jpg")][:count]
        return [tar.extractfile(member).read() for member in members]  # type: ignore[union-attr]


def square(data: bytes) -> np.ndarray:
    """uint8[256, 256, 3], as the release makes it: shorter side to 256, centre crop."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = 256 / min(image.size)
    width, height = (max(256, int(side * scale)) for side in image.size)
    left, top = (width - 256) // 2, (height - 256) // 2
    return np.asarray(image.resize((width, height)).crop((left, top, left + 256, top + 256)))


class Plain(nn.Module):
    """taming's encoder and search as they come, without middle attention."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        sizes = config.model_dump(include={"ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resolution"})
        with contextlib.redirect_stdout(io.StringIO()):
            self.encoder = Encoder(**sizes, z_channels=config.z_channels, in_channels=3, out_ch=3, double_z=False)
        self.encoder.mid.attn_1 = nn.Identity()
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.codebook = nn.Parameter(torch.randn(config.num_codes, config.embed_dim))

    def forward(self, pixels: Tensor) -> Tensor:
        z = self.quant_conv(self.encoder(pixels)).permute(0, 2, 3, 1).flatten(0, 2)
        distances: Tensor = (z**2).sum(1, keepdim=True) + (self.codebook**2).sum(1) - 2 * z @ self.codebook.T
        return distances.argmin(1)


def flops_per_picture(model: Plain) -> float:
    """Multiplications and additions of the convolutions and of the search, for one picture."""
    total = 0.0

    def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d)
        total += 2.0 * output.shape[2:].numel() * module.weight.numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.inference_mode():
        model(torch.zeros(1, 3, 256, 256))
    for hook in hooks:
        hook.remove()
    return total + 2.0 * 256 * model.codebook.numel()


def peak_flops(dtype: torch.dtype, side: int = 2048) -> float:
    """FLOP/s of the best of four square matmuls."""
    a, b = torch.randn(side, side).to(dtype), torch.randn(side, side).to(dtype)
    return max(2.0 * side**3 / seconds(lambda: a @ b) for _ in range(4))


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def encode_loop(model: Plain, files: list[bytes], batch: int, dtype: torch.dtype, layout: torch.memory_format) -> None:
    for at in range(0, len(files), batch):
        pixels = np.stack([square(data) for data in files[at : at + batch]])
        inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.inference_mode():
            model(inputs.to(dtype).contiguous(memory_format=layout))


def compare(name: str, config: VQGANConfig, files: list[bytes], rounds: int) -> None:
    """Print a table: seconds per picture, ratio to the plain loop, share of the matmul peak."""
    torch.manual_seed(0)
    planes, last = torch.contiguous_format, torch.channels_last
    model = Plain(config).eval()
    flops = flops_per_picture(model)
    half = Plain(config).eval().bfloat16()
    ways: dict[str, tuple[torch.dtype, Callable[[], object]]] = {}

    def loop(label: str, model: Plain, batch: int, dtype: torch.dtype, layout: torch.memory_format) -> None:
        def run() -> None:
            nn.Module.to(model, memory_format=layout)  # type: ignore[call-overload]
            encode_loop(model, files, batch, dtype, layout)

        ways[label] = (dtype, run)

    loop("plain: float32, planes, one at a time", model, 1, torch.float32, planes)
    loop("layout: float32, channels last", model, 1, torch.float32, last)
    loop(f"batch: float32, planes, {BATCH} at once", model, BATCH, torch.float32, planes)
    loop("dtype: bfloat16, planes", half, 1, torch.bfloat16, planes)
    loop("dtype, layout: bfloat16, channels last", half, 1, torch.bfloat16, last)
    loop(f"all three: bfloat16, channels last, {BATCH}", half, BATCH, torch.bfloat16, last)
    for dtype_name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        spec = VisionTokenizerSpec.model_validate(
            {"name": name, "weights": "", "sha256": "0" * 64, "dtype": dtype_name, "config": config}
        )
        tokenizer = VisionTokenizer(spec, VQGAN(config))

        def ours(tokenizer: VisionTokenizer = tokenizer) -> None:
            tokenizer.encode(np.stack([square(data) for data in files]))

        ways[f"tokenizer, {dtype_name}"] = (dtype, ours)
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):  # in turn, so that a busy machine slows all
        for label, (_, run) in ways.items():
            best[label] = min(best[label], seconds(run) / len(files))
    peaks = {dtype: peak_flops(dtype) for dtype in (torch.float32, torch.bfloat16)}
    rates = ", ".join(f"{str(dtype)[6:]} {peak / 1e9:,.0f}" for dtype, peak in peaks.items())
    print(f"{name}: {flops / 1e9:.1f} GFLOP per picture; matmul peak in GFLOP/s: {rates}")
    plain = next(iter(best.values()))
    for label, time_taken in best.items():
        peak = peaks[ways[label][0]]
        print(
            f"  {label:42} {time_taken:7.3f} s  {plain / time_taken:5.2f} x  {flops / time_taken / peak:4.0%} of peak"
        )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    files = photographs(given.pictures)
    print(f"{torch.get_num_threads()} threads, best of {given.rounds} rounds of {len(files)} pictures")
    compare("release size", RELEASE, files, given.rounds)
    compare("demo size", DEMO_CONFIG, files, given.rounds)


if __name__ == "__main__":
    main()
