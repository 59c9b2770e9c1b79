"""Anyone's VQGAN weights to ours: a safetensors file in taming's names, and the spec that vouches for it.

    last.ckpt, model.yaml                       taming             |    tokenizers/mine.safetensors
    model.safetensors                           any of the three   | -> tokenizers/mine.yaml
    diffusion_pytorch_model.safetensors, config.json   diffusers   |      sha256, dtype, config
    vqgan (a pickle)                            LWM release        |

Nothing in the file is run. Every name, shape and value is checked before anything is written; the sizes come from
the shapes, so that a config beside the file is only held against them. The same file gives the same bytes.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from lwm_data.vision.spec import (
    AboutTokenizer,
    VisionTokenizerSpec,
    VQGANConfig,
    file_sha256,
    write_vision_tokenizer_spec,
)
from lwm_data.vision.vqgan import weight_shapes
from lwm_data.vision.weight_files import read_weight_file
from lwm_data.vision.weight_names import LAYOUTS, Layout, config_of_shapes, layout_of, taming_name

MAX_CONFIG = 1 << 20  # bytes
SHOWN = 6  # names in an error


def import_vision_tokenizer(
    source: Path,
    out: Path,
    *,
    config: Path | None = None,
    layout: Literal["auto"] | Layout = "auto",
    dtype: Literal["fp32", "bf16"] = "fp32",
    name: str | None = None,
) -> VisionTokenizerSpec:
    """Read VQGAN weights from `source`; write `out` (.yaml) and the weights beside it (.safetensors).

    config: taming's .yaml or diffusers' config.json; without it, the one that lies beside `source`, if any. It must
    say what the weights say. dtype: what the tokenizer computes in; the weights keep the dtype that they have.
    ValueError names the file, what it has, what was wanted and what to do.
    """
    if out.suffix != ".yaml":
        raise ValueError(f"--out: got {out}; wanted a name that ends in .yaml (the weights go beside it)")
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"--layout: got {layout!r}; wanted auto, {', '.join(LAYOUTS)}")
    weights = out.with_suffix(".safetensors")
    for path in (out, weights):
        if any(given is not None and given.resolve() == path.resolve() for given in (source, config)):
            raise ValueError(f"--out: {path} would take the place of what is read; choose another name or folder")
    found = read_weight_file(source)
    try:
        used = layout_of(found) if layout == "auto" else layout
        tensors = _as_taming(found, used)
        sizes = config_of_shapes({key: tuple(tensor.shape) for key, tensor in tensors.items()})
        _check(tensors, weight_shapes(sizes), {taming_name(key, used): key for key in found})
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    found.clear()
    beside = source.with_name("config.json") if used == "diffusers" else source.with_suffix(".yaml")
    if config is not None or (beside.is_file() and beside.resolve() != out.resolve()):
        _check_config(config or beside, sizes, source, explicit=config is not None)
    out.parent.mkdir(parents=True, exist_ok=True)
    _write_weights(tensors, weights)
    shown = source.name.encode("utf-8", "backslashreplace").decode()
    of_source = file_sha256(source)
    spec = VisionTokenizerSpec(
        name=out.stem if name is None else name,
        weights=str(weights.absolute()),
        sha256=file_sha256(weights),
        dtype=dtype,
        config=sizes,
        about=AboutTokenizer.model_validate({"note": f"imported from {shown} ({used} layout, sha256 {of_source})"}),
    )
    write_vision_tokenizer_spec(spec, out.absolute())
    return spec


def _as_taming(found: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The tensors by taming's names and in its order of dims. What only training needs, `loss.*`, is left out."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in found.items():
        if layout == "taming" and name.startswith("loss."):
            continue
        if layout == "lwm" and name.endswith("/kernel"):
            if tensor.ndim != 4:
                raise ValueError(f"{name!r}: got shape {list(tensor.shape)}; wanted [height, width, in, out]")
            tensor = tensor.permute(3, 2, 0, 1)
        ours = taming_name(name, layout)
        if layout == "diffusers" and ".attn" in ours and ours.endswith(".weight") and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # a linear layer, where taming has a 1 x 1 convolution
        if ours in tensors:
            raise ValueError(f"{name!r} and another tensor both stand for {ours}; wanted each layer once")
        tensors[ours] = tensor
    return tensors


def _check(tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, str]) -> None:
    """That there is each tensor, of its shape, finite, and no other. given: the file's name of each."""
    wrong = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [repr(given[name][:120]) for name in tensors if name not in wanted],
        "of another shape": [
            f"{name} {list(tensors[name].shape)} (wanted {list(shape)})"
            for name, shape in wanted.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ],
    }
    if any(wrong.values()):
        parts = [
            f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
            for kind, names in wrong.items()
            if names
        ]
        raise ValueError(
            f"{len(tensors)} tensors; wanted the {len(wanted)} of a VQGAN of these widths (by taming's names); "
            f"{'; '.join(parts)}; the file is of another model, or was cut or renamed"
        )
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise ValueError(f"{given[name]}: got {tensor.dtype}; wanted floats of 16 bits or more")
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"{given[name]}: {bad:,} of {tensor.numel():,} numbers are nan or infinite; fetch it again"
            )


def _write_weights(tensors: dict[str, Tensor], path: Path) -> None:
    """Write `path` whole or not at all. Tensors become dense one by one, so that memory holds them once."""
    for name, tensor in tensors.items():
        dense = tensor.contiguous()
        shared = dense.untyped_storage().nbytes() != dense.nbytes
        tensors[name] = dense.clone() if shared else dense
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_config(path: Path, sizes: VQGANConfig, source: Path, *, explicit: bool) -> None:
    """That the config of `path` says of the model what its weights say. One found beside it may be of another kind."""
    got = _read_config(path)
    if "block_out_channels" in got:
        wanted: dict[str, Any] = {
            "block_out_channels": [sizes.ch * mult for mult in sizes.ch_mult],
            "layers_per_block": sizes.num_res_blocks,
            "latent_channels": sizes.z_channels,
            "num_vq_embeddings": sizes.num_codes,
            "vq_embed_dim": sizes.embed_dim,
            "mid_block_add_attention": sizes.mid_attention,
            **{"in_channels": 3, "out_channels": 3, "act_fn": "silu", "norm_num_groups": 32, "norm_type": "group"},
        }
        if got.get("vq_embed_dim", 0) is None:
            got["vq_embed_dim"] = got.get("latent_channels")
    elif isinstance(got.get("model"), dict) and isinstance(got["model"].get("params"), dict):
        params = got["model"]["params"]
        got = {"n_embed": params.get("n_embed"), "embed_dim": params.get("embed_dim")}
        got |= params["ddconfig"] if isinstance(params.get("ddconfig"), dict) else {}
        wanted = sizes.model_dump(include={"ch", "num_res_blocks", "z_channels", "embed_dim"})
        wanted |= {"n_embed": sizes.num_codes, "ch_mult": list(sizes.ch_mult)}
        wanted |= {"double_z": False, "in_channels": 3, "out_ch": 3, "resamp_with_conv": True}
    elif explicit:
        raise ValueError(f"{path}: wanted taming's config (model: params: ddconfig) or diffusers' (block_out_channels)")
    else:
        return
    for key, value in wanted.items():
        if got.get(key) is not None and got[key] != value:
            raise ValueError(
                f"{path}: {key}: got {reprlib.repr(got[key])}; the weights of {source.name} have {value}; "
                "give the config that belongs to them with --config"
            )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file() or path.stat().st_size > MAX_CONFIG:
        raise ValueError(f"{path}: no such file, or over {MAX_CONFIG:,} bytes; wanted a model's config")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            value = json.loads(text)
        elif any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("aliases (`*name`), of which a short file can make more than there is memory")
        else:
            value = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: not {path.suffix.lstrip('.') or 'YAML'}: {error}; wanted a model's config") from None
    return value if isinstance(value, dict) else {}
