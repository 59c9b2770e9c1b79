"""Three families name the same layers of a VQGAN in three ways; here they become taming's, and sizes come of shapes.

    taming                     diffusers' VQModel (aMUSEd)         LWM release
    encoder.down.1.block.0     encoder.down_blocks.1.resnets.0     encoder/DownsamplingBlock_1/ResnetBlock_0
    decoder.up.1.block.0       decoder.up_blocks.3.resnets.0       decoder/UpsamplingBlock_3/ResnetBlock_0
    encoder.mid.block_1        encoder.mid_block.resnets.0         encoder/MidBlock_0/ResnetBlock_0
    norm1, conv1, norm2, conv2, nin_shortcut
                               .., conv_shortcut                   GroupNorm_0, Conv_0, GroupNorm_1, Conv_1, Conv_2
    weight [out, in, h, w]     weight [out, in, h, w]              kernel [h, w, in, out]

taming counts the decoder's levels from the finest, the others in the order of their calls, from the deepest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, get_args

from pydantic import ValidationError

from lwm_data.vision.spec import NUM_LEVELS, RESOLUTION, VQGANConfig

Layout = Literal["taming", "diffusers", "lwm"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
FIRST = {  # the layer that meets the pixels, which each family has under one name
    "taming": "encoder.down.0.block.0.conv1.weight",
    "diffusers": "encoder.down_blocks.0.resnets.0.conv1.weight",
    "lwm": "encoder/DownsamplingBlock_0/ResnetBlock_0/Conv_0/kernel",
}
UP = "decoder.up_blocks."  # diffusers'; its number, from the deepest level, is turned round last

# Regular expressions and what takes their place, one after the other.
DIFFUSERS = (
    (r"^encoder\.down_blocks\.", "encoder.down."),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.downsamplers\.0\.", ".downsample."),
    (r"\.upsamplers\.0\.", ".upsample."),
    (r"\.mid_block\.block\.0\.", ".mid.block_1."),
    (r"\.mid_block\.block\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attn\.0\.", ".mid.attn_1."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"(\.attn[._]\d\.)group_norm\.", r"\1norm."),
    (r"(\.attn[._]\d\.)(?:to_q|query)\.", r"\1q."),
    (r"(\.attn[._]\d\.)(?:to_k|key)\.", r"\1k."),
    (r"(\.attn[._]\d\.)(?:to_v|value)\.", r"\1v."),
    (r"(\.attn[._]\d\.)(?:to_out\.0|proj_attn)\.", r"\1proj_out."),
)
LWM = (
    (r"/", "."),
    (r"^quantize\.embeddings$", "quantize.embedding.weight"),
    (r"\.(?:kernel|scale)$", ".weight"),
    (r"^(encoder|decoder)\.Conv_0\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.Conv_1\.", r"\1.conv_out."),
    (r"^(encoder|decoder)\.GroupNorm_0\.", r"\1.norm_out."),
    (r"\.GroupNorm_0\.", ".norm1."),
    (r"\.GroupNorm_1\.", ".norm2."),
    (r"\.Downsample_0\.Conv_0\.", ".downsample.conv."),
    (r"\.Upsample_0\.Conv_0\.", ".upsample.conv."),
    (r"(ResnetBlock_\d)\.Conv_0\.", r"\1.conv1."),
    (r"(ResnetBlock_\d)\.Conv_1\.", r"\1.conv2."),
    (r"(ResnetBlock_\d)\.Conv_2\.", r"\1.nin_shortcut."),
    (r"\.MidBlock_0\.ResnetBlock_0\.", ".mid.block_1."),
    (r"\.MidBlock_0\.ResnetBlock_1\.", ".mid.block_2."),
    (r"\.ResnetBlock_(\d)\.", r".block.\1."),
    (r"\.DownsamplingBlock_(\d)\.", r".down.\1."),
    (r"^decoder\.UpsamplingBlock_(\d)\.", UP + r"\1."),
)


def layout_of(names: Mapping[str, object]) -> Layout:
    """Which family's names these are. ValueError where they are none of the three."""
    for layout in LAYOUTS:
        if FIRST[layout] in names:
            return layout
    some = ", ".join(repr(name[:80]) for name in sorted(names)[:4])
    raise ValueError(
        f"{len(names)} tensors, {some} ...; wanted a VQGAN, with a tensor named "
        f"{FIRST['taming']} (taming), {FIRST['diffusers']} (diffusers) or {FIRST['lwm']} (the LWM release)"
    )


def taming_name(name: str, layout: Layout) -> str:
    """taming's name of the tensor that `layout` calls `name`; a name that is not known comes back changed or not."""
    if layout == "taming":
        return name
    for pattern, replacement in DIFFUSERS if layout == "diffusers" else LWM:
        name = re.sub(pattern, replacement, name)
    if found := re.match(r"decoder\.up_blocks\.(\d)\.", name):
        return f"decoder.up.{NUM_LEVELS - 1 - int(found[1])}.{name[found.end() :]}"
    return name


def config_of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> VQGANConfig:
    """The sizes of the VQGAN whose tensors, named as taming names them, have these shapes.

    Where attention stands is told by its tensors, as the side of the feature map when a picture has 256 x 256 pixels.
    ValueError where a tensor that tells a size is missing, or a size is none that we compute with.
    """
    ch, in_channels, *_ = _shape(shapes, "encoder.conv_in.weight", 4)
    if in_channels != 3:
        raise ValueError(f"encoder.conv_in.weight: got {in_channels} channels of a picture; wanted 3")
    levels = _count(shapes, r"encoder\.down\.(\d+)\.")
    if levels != NUM_LEVELS:
        raise ValueError(
            f"got {levels} levels of the encoder; wanted {NUM_LEVELS}, so that a code covers 16 x 16 pixels"
        )
    widths = [_shape(shapes, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels)]
    if ch == 0 or any(width % ch for width in widths):
        raise ValueError(f"got levels of {widths} channels; wanted multiples of the first layer's {ch}")
    embed_dim, z_channels, *_ = _shape(shapes, "quant_conv.weight", 4)
    if (out := _shape(shapes, "encoder.conv_out.weight", 4)[0]) == 2 * z_channels:
        raise ValueError(f"the encoder gives {out} channels for {z_channels}: double_z, a VAE; wanted a VQGAN")
    attended = [i for i in range(levels) if any(name.startswith(f"encoder.down.{i}.attn.") for name in shapes)]
    try:
        return VQGANConfig(
            ch=ch,
            ch_mult=tuple(width // ch for width in widths),
            num_res_blocks=_count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
            attn_resolutions=tuple(RESOLUTION >> i for i in attended),
            mid_attention="encoder.mid.attn_1.q.weight" in shapes,
            z_channels=z_channels,
            embed_dim=embed_dim,
            num_codes=_shape(shapes, "quantize.embedding.weight", 2)[0],
            resolution=RESOLUTION,
        )
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "sizes"
        about = VQGANConfig.model_fields[key].description if key in VQGANConfig.model_fields else ""
        message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        raise ValueError(f"{key}: got {first['input']!r}; wanted {message} ({about})") from None


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, dims: int) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"has no tensor {name}, by taming's names; wanted a whole VQGAN")
    if len(shapes[name]) != dims:
        raise ValueError(f"{name}: got shape {list(shapes[name])}; wanted {dims} dims")
    return shapes[name]


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    return len({found[1] for name in shapes if (found := re.match(pattern, name))})
