"""The vision verbs of lwm-data: one file to codes and back, and tokenizers of pictures.

    lwm-data vision encode | decode
    lwm-data tokenizer import-vision | train-vision

Heavy imports wait inside the verbs.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import UInt8

    from lwm_data.vision.vqgan import VisionTokenizer

vision_app = typer.Typer(no_args_is_help=True, help="Pictures and clips to VQGAN codes, and codes to pictures.")

MAX_PICTURE = 256 << 20  # bytes; a larger file can only be a clip
SHOWN_FRAMES = 16  # of a clip, in the picture beside the codes

Tokenizer = Annotated[Path, typer.Option(metavar="SPEC", help="A vision tokenizer, tokenizers/*.yaml.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Fps = Annotated[float, typer.Option(min=0.001, max=1000, help="Frames taken of a clip per second.")]
MaxFrames = Annotated[int, typer.Option(min=1, help="Of a clip; more are thinned out evenly.")]
Device = Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to compute.")]


@vision_app.command()
def encode(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A picture or a clip.")],
    tokenizer: Tokenizer,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Codes: .npy (int32 [frames, 256]) or .json.")
    ] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Originals above their reconstructions.")] = None,
    fps: Fps = 4.0,
    max_frames: MaxFrames = 8,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """See one picture or clip through a tokenizer: its codes, and how well they keep it.

    Example: `lwm-data vision encode cat.jpg --tokenizer tokenizers/demo-vision.yaml --out cat.npy --png cat.png`

    PSNR is of what the codes give back, against the 256 x 256 pixels that were encoded. A clip is sampled by its time
    stamps; where that gives more than `--max-frames`, they are spread over all of it.
    """
    import numpy as np

    from lwm_data.format.atomic import write_whole
    from lwm_data.vision.picture_files import write_codes_file
    from lwm_data.vision.pictures import evenly, png_bytes, strip
    from lwm_data.vision.train_vqgan import psnr

    if png is not None and png.suffix.lower() != ".png":
        raise ValueError(f"--png: got {png}; wanted a name that ends in .png")
    frames = _frames(file, fps, max_frames)
    loaded = _load(tokenizer, device)
    codes = loaded.encode(frames)
    back = loaded.decode(codes)
    if out is not None:
        write_codes_file(codes, out)
    if png is not None:
        shown = evenly(len(frames), SHOWN_FRAMES)
        png.parent.mkdir(parents=True, exist_ok=True)
        write_whole(png, png_bytes(strip(frames[shown], back[shown], height=frames.shape[1])))
    found = {"frames": len(codes), "codes_used": len(np.unique(codes)), "psnr": round(psnr(frames, back), 2)}
    if as_json:
        print(json.dumps(found | {"tokenizer": loaded.fingerprint}))
        return
    num_codes = loaded.spec.config.num_codes
    what = "1 frame" if len(codes) == 1 else f"{len(codes):,} frames"
    print(f"{file}: {what}, {found['codes_used']:,} of {num_codes:,} codes used, PSNR {found['psnr']:.2f} dB")
    for path in filter(None, (out, png)):
        print(f"written: {path}")


@vision_app.command()
def decode(
    codes: Annotated[Path, typer.Argument(metavar="CODES", help="What `encode` wrote: .npy or .json.")],
    tokenizer: Tokenizer,
    out: Annotated[Path, typer.Option(metavar="FILE", help=".png (several frames: side by side), .gif or .mp4.")],
    fps: Annotated[float, typer.Option(min=0.001, max=1000, help="Of a .gif or .mp4.")] = 4.0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Codes to a picture, a strip of pictures, or a clip.

    Example: `lwm-data vision decode clip.npy --tokenizer tokenizers/demo-vision.yaml --out clip.mp4`
    """
    from lwm_data.vision.picture_files import WRITERS, read_codes_file, write_frames

    if out.suffix.lower() not in WRITERS:
        raise ValueError(f"--out: got {out}; wanted a name that ends in {', '.join(WRITERS)}")
    found = read_codes_file(codes)
    loaded = _load(tokenizer, device)
    try:
        frames = loaded.decode(found)
    except ValueError as error:  # codes above those of this tokenizer
        raise ValueError(f"{codes}: {error}; is {tokenizer} the tokenizer that it was encoded with?") from None
    write_frames(frames, out, fps)
    print(json.dumps({"frames": len(frames), "out": str(out)}) if as_json else f"{out}: {len(frames):,} frames")


def import_vision(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="VQGAN weights: see the formats below.")],
    out: Annotated[Path, typer.Option(metavar="SPEC", help="The spec to write (.yaml); the weights go beside it.")],
    config: Annotated[Path | None, typer.Option(help="The model's own config, where it does not lie beside.")] = None,
    layout: Annotated[Literal["auto", "taming", "diffusers", "lwm"], typer.Option(help="How tensors are named.")] = (
        "auto"
    ),
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="Computed in; bf16 gives some other codes.")] = "fp32",
    name: Annotated[str | None, typer.Option(help="Name of the tokenizer; default: that of the file.")] = None,
    as_json: Json = False,
) -> None:
    """Turn anyone's VQGAN weights into a vision tokenizer: a safetensors file and a spec with its sha256.

    Example: `lwm-data tokenizer import-vision vqgan --out tokenizers/lwm-vision.yaml`

    Reads the LWM release's `vqgan` (a pickle, of which nothing is run), taming-transformers' `.ckpt` with its `.yaml`,
    diffusers' `VQModel` (`diffusion_pytorch_model.safetensors`) and taming's names in safetensors.
    """
    from lwm_data.vision.spec import vision_tokenizer_fingerprint
    from lwm_data.vision.weights import import_vision_tokenizer

    spec = import_vision_tokenizer(file, out, config=config, layout=layout, dtype=dtype, name=name)
    if as_json:
        found = {"out": str(out), "sha256": spec.sha256, "fingerprint": vision_tokenizer_fingerprint(spec)}
        print(json.dumps(found | {"config": spec.config.model_dump()}))
        return
    config_line = f"{spec.config.num_codes:,} codes, ch {spec.config.ch} x {list(spec.config.ch_mult)}"
    print(f"{out}: {config_line}, {spec.dtype}; sha256 {spec.sha256[:12]} of {Path(spec.weights).name}")


def train_vision(
    files: Annotated[list[str], typer.Argument(metavar="FILES", help="Globs of tars, pictures and clips.")],
    out: Annotated[Path, typer.Option(metavar="SPEC", help="The spec to write (.yaml); the weights go beside it.")],
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of weights and batches.")] = 0,
    learning_rate: Annotated[float, typer.Option(min=0, help="At its highest.")] = 0.02,
    fps: Fps = 2.0,
    max_frames: MaxFrames = 16,
    keep_out: Annotated[
        int, typer.Option(min=0, help="Measure on every so many-th file instead of training on it; 0: none.")
    ] = 10,
    note: Annotated[str, typer.Option(help="Goes to the spec, for people.")] = "",
    as_json: Json = False,
) -> None:
    """Train a small VQGAN on pictures and clips.

    Example: `lwm-data tokenizer train-vision 'photos/*.tar' 'clips/*.mp4' --out tokenizers/mine.yaml --steps 10000`

    On a CPU, some hundred pictures take hours; stop it with Ctrl-C and give the same command again to go on. The same
    command gives the same bytes. PSNR and the codes used stand in the spec.
    """
    from lwm_data.vision.train_vqgan import Recipe, train_vision_tokenizer
    from lwm_data.vision_training import read_training_frames

    if out.suffix != ".yaml":  # told before hours of decoding
        raise ValueError(f"--out: got {out}; wanted a name that ends in .yaml (the weights go beside it)")
    found = read_training_frames(files, fps, max_frames, keep_out)
    if found.rejected:
        why = ", ".join(f"{reason} {count:,}" for reason, count in sorted(found.rejected.items()))
        print(f"train-vision: files left out: {why}", file=sys.stderr)
    out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = train_vision_tokenizer(
        found.trained,
        out,
        Recipe(steps=steps, seed=seed, learning_rate=learning_rate),
        heldout=found.kept_out if len(found.kept_out) else None,
        comment=_command(files, out, steps, seed, learning_rate, fps, max_frames, keep_out),
        note=note,
    )
    about = tokenizer.spec.about
    assert about is not None, "measured at the end of training"
    if as_json:
        frames = {"frames": len(found.trained), "kept_out": len(found.kept_out)}
        print(json.dumps({"out": str(out), "fingerprint": tokenizer.fingerprint} | frames | about.model_dump()))
        return
    print(f"{out}: {len(found.trained):,} frames, PSNR {about.psnr:.2f} dB, {about.codes_used:,} codes used")
    if about.heldout_psnr is not None:
        print(
            f"kept out: {len(found.kept_out):,} frames, PSNR {about.heldout_psnr:.2f} dB, "
            f"{about.heldout_codes_used:,} codes used"
        )


def add_vision_verbs(tokenizer_app: typer.Typer) -> None:
    """Add import-vision and train-vision to `lwm-data tokenizer`."""
    tokenizer_app.command("import-vision")(import_vision)
    tokenizer_app.command("train-vision")(train_vision)


def _load(spec: Path, device: str) -> VisionTokenizer:
    import torch

    from lwm_data.vision.vqgan import load_vision_tokenizer

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda; torch finds none here; wanted cpu, or a build of torch with CUDA")
    return load_vision_tokenizer(spec, device)


def _frames(file: Path, fps: float, max_frames: int) -> UInt8[np.ndarray, "n 256 256 3"]:
    """The frames of a picture (one) or a clip; what it is, its bytes tell."""
    import numpy as np

    from lwm_data.vision.frames import decode_image, decode_video

    if not file.is_file():
        got = "a folder" if file.is_dir() else "no such file"
        raise ValueError(f"{file}: {got}; wanted a picture or a clip")
    try:
        if file.stat().st_size <= MAX_PICTURE:
            try:
                return decode_image(file.read_bytes())[np.newaxis]
            except ValueError as error:
                if error.args[0] != "not an image":
                    raise
        return np.stack(list(decode_video(file, fps=fps, max_frames=max_frames)))
    except ValueError as error:
        if len(error.args) != 2:
            raise
        reason, detail = error.args
        told = "neither a picture nor a clip" if reason == "not a video" else reason
        raise ValueError(f"{file}: {told}: {detail}") from None


def _command(files: list[str], out: Path, *options: float) -> str:
    """The command line again, on one line of printable characters."""
    names = ("--steps", "--seed", "--learning-rate", "--fps", "--max-frames", "--keep-out")
    words = ["lwm-data", "tokenizer", "train-vision", *files, "--out", str(out)]
    words += [word for name, value in zip(names, options, strict=True) for word in (name, str(value))]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shlex.join(words))
