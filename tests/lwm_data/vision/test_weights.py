"""Four kinds of files with the same weights become the same tokenizer, and its codes are those the layers define.

The reference reads the LWM release's tree as it stands (kernels height, width, in, out) and computes in float64 with
numpy alone. The three families' names are written out here by loops of their own.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lwm_data.vision.spec import VisionTokenizerSpec, VQGANConfig, read_vision_tokenizer_spec
from lwm_data.vision.vqgan import VQGAN, load_vision_tokenizer
from lwm_data.vision.weights import import_vision_tokenizer

RELEASE = VQGANConfig(
    ch=128, ch_mult=(1, 2, 2, 4, 6), num_res_blocks=2, mid_attention=False, z_channels=64, embed_dim=64, num_codes=8192
)
QUARTER = RELEASE.model_copy(update={"ch": 32})  # the release at a quarter of its width
ATTENDED = VQGANConfig(ch=32, ch_mult=(1, 1, 1, 1, 2), num_res_blocks=1, attn_resolutions=(16,), num_codes=512)
TINY = VQGANConfig(
    ch=32, ch_mult=(1, 1, 1, 1, 2), num_res_blocks=1, mid_attention=False, z_channels=8, embed_dim=4, num_codes=64
)

# --- the release's tree, and its encoder -------------------------------------------------------------------------


def _random_tree(config: VQGANConfig, seed: int) -> dict[str, Any]:
    """Random weights as the release's layers hold them; each layer keeps the size of what goes through it."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    def conv(size: int, into: int, out: int) -> dict[str, np.ndarray]:
        return {
            "kernel": normal(size, size, into, out, scale=(size * size * into) ** -0.5),
            "bias": normal(out, scale=0.1),
        }

    def norm(width: int) -> dict[str, np.ndarray]:
        return {"scale": 1 + normal(width, scale=0.1), "bias": normal(width, scale=0.1)}

    def resnet(into: int, out: int) -> dict[str, Any]:
        block = {"GroupNorm_0": norm(into), "Conv_0": conv(3, into, out)}
        block |= {"GroupNorm_1": norm(out), "Conv_1": conv(3, out, out)}
        return block | ({"Conv_2": conv(1, into, out)} if into != out else {})

    def blocks(count: int, into: int, out: int) -> dict[str, Any]:
        return {f"ResnetBlock_{j}": resnet(into if j == 0 else out, out) for j in range(count)}

    widths = [config.ch * mult for mult in config.ch_mult]
    encoder: dict[str, Any] = {"Conv_0": conv(3, 3, config.ch)}
    into = config.ch
    for i, width in enumerate(widths):
        encoder[f"DownsamplingBlock_{i}"] = blocks(config.num_res_blocks, into, width)
        if i < 4:
            encoder[f"DownsamplingBlock_{i}"]["Downsample_0"] = {"Conv_0": conv(3, width, width)}
        into = width
    encoder["MidBlock_0"] = blocks(2, into, into)
    encoder |= {"GroupNorm_0": norm(into), "Conv_1": conv(3, into, config.z_channels)}
    decoder: dict[str, Any] = {"Conv_0": conv(3, config.z_channels, into), "MidBlock_0": blocks(2, into, into)}
    for k, width in enumerate(reversed(widths)):
        decoder[f"UpsamplingBlock_{k}"] = blocks(config.num_res_blocks + 1, into, width)
        if k < 4:
            decoder[f"UpsamplingBlock_{k}"]["Upsample_0"] = {"Conv_0": conv(3, width, width)}
        into = width
    decoder |= {"GroupNorm_0": norm(into), "Conv_1": conv(3, into, 3)}
    return {
        "encoder": encoder,
        "decoder": decoder,
        "quant_conv": conv(1, config.z_channels, config.embed_dim),
        "post_quant_conv": conv(1, config.embed_dim, config.z_channels),
        "quantize": {"embeddings": normal(config.num_codes, config.embed_dim, scale=0.6)},
    }


def _conv(x_HWI: np.ndarray, layer: dict[str, np.ndarray], stride: int = 1) -> np.ndarray:
    """A convolution, tap by tap, over input that is padded already."""
    kernel = layer["kernel"].astype(np.float64)
    height, width = ((side - len(kernel)) // stride + 1 for side in x_HWI.shape[:2])
    y_HWO = np.zeros((height, width, kernel.shape[3])) + layer["bias"]
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            seen = x_HWI[i : i + (height - 1) * stride + 1 : stride, j : j + (width - 1) * stride + 1 : stride]
            y_HWO += seen @ kernel[i, j]
    return y_HWO


def _same(x_HWI: np.ndarray, layer: dict[str, np.ndarray]) -> np.ndarray:
    around = layer["kernel"].shape[0] // 2
    return _conv(np.pad(x_HWI, [(around, around), (around, around), (0, 0)]), layer)


def _norm_silu(x_HWC: np.ndarray, layer: dict[str, np.ndarray]) -> np.ndarray:
    groups = x_HWC.reshape(x_HWC.shape[0] * x_HWC.shape[1], 32, -1)
    mean = groups.mean((0, 2), keepdims=True)
    spread = np.sqrt(((groups - mean) ** 2).mean((0, 2), keepdims=True) + 1e-6)
    y_HWC = ((groups - mean) / spread).reshape(x_HWC.shape) * layer["scale"] + layer["bias"]
    return y_HWC / (1 + np.exp(-y_HWC))


def _resnet(x_HWC: np.ndarray, block: dict[str, Any]) -> np.ndarray:
    h_HWC = _same(_norm_silu(x_HWC, block["GroupNorm_0"]), block["Conv_0"])
    h_HWC = _same(_norm_silu(h_HWC, block["GroupNorm_1"]), block["Conv_1"])
    return h_HWC + (_same(x_HWC, block["Conv_2"]) if "Conv_2" in block else x_HWC)


def _release_codes(tree: dict[str, Any], picture: np.ndarray) -> np.ndarray:
    """int64[n]: codes of uint8[16 h, 16 w, 3], n = h w, by the release's layers, in float64."""
    encoder = tree["encoder"]
    x_HWC = _same(picture / 127.5 - 1, encoder["Conv_0"])
    for i in range(5):
        level = encoder[f"DownsamplingBlock_{i}"]
        for j in range(sum(name.startswith("Resnet") for name in level)):
            x_HWC = _resnet(x_HWC, level[f"ResnetBlock_{j}"])
        if i < 4:
            bottom_right = np.pad(x_HWC, [(0, 1), (0, 1), (0, 0)])
            x_HWC = _conv(bottom_right, level["Downsample_0"]["Conv_0"], stride=2)
    for j in range(2):
        x_HWC = _resnet(x_HWC, encoder["MidBlock_0"][f"ResnetBlock_{j}"])
    x_HWC = _same(_norm_silu(x_HWC, encoder["GroupNorm_0"]), encoder["Conv_1"])
    vectors_NE = _same(x_HWC, tree["quant_conv"]).reshape(-1, tree["quantize"]["embeddings"].shape[1])
    codebook_KE = tree["quantize"]["embeddings"].astype(np.float64)
    return np.array([((codebook_KE - vector_E) ** 2).sum(1).argmin() for vector_E in vectors_NE])


def _pictures(count: int) -> np.ndarray:
    """Waves and noise: no two places are alike."""
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:256, :256] / 256
    waves = [127 + 100 * np.sin(6 * rng.normal(size=3) * x[..., None] + 9 * y[..., None] ** 2) for _ in range(count)]
    return np.clip(np.array(waves) + rng.normal(0, 20, (count, 256, 256, 3)), 0, 255).astype(np.uint8)


# --- the same weights under the three families' names --------------------------------------------------------------


def _taming_state(tree: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The release's tree under taming's names."""
    state: dict[str, torch.Tensor] = {}

    def put(name: str, layer: dict[str, np.ndarray]) -> None:
        weight = layer["kernel"].transpose(3, 2, 0, 1) if "kernel" in layer else layer["scale"]
        state[f"{name}.weight"] = torch.from_numpy(weight.copy())
        state[f"{name}.bias"] = torch.from_numpy(layer["bias"].copy())

    def put_blocks(names: list[str], blocks: dict[str, Any]) -> None:
        for j, name in enumerate(names):
            block = blocks[f"ResnetBlock_{j}"]
            for ours, theirs in {"norm1": "GroupNorm_0", "conv1": "Conv_0", "norm2": "GroupNorm_1"}.items():
                put(f"{name}.{ours}", block[theirs])
            put(f"{name}.conv2", block["Conv_1"])
            if "Conv_2" in block:
                put(f"{name}.nin_shortcut", block["Conv_2"])

    for part in ("encoder", "decoder"):
        put(f"{part}.conv_in", tree[part]["Conv_0"])
        put(f"{part}.conv_out", tree[part]["Conv_1"])
        put(f"{part}.norm_out", tree[part]["GroupNorm_0"])
        put_blocks([f"{part}.mid.block_1", f"{part}.mid.block_2"], tree[part]["MidBlock_0"])
        for i in range(5):
            level = tree[part][f"DownsamplingBlock_{i}" if part == "encoder" else f"UpsamplingBlock_{4 - i}"]
            place = f"{part}.{'down' if part == 'encoder' else 'up'}.{i}"
            put_blocks([f"{place}.block.{j}" for j in range(sum(name.startswith("Resnet") for name in level))], level)
            for theirs, ours in {"Downsample_0": "downsample", "Upsample_0": "upsample"}.items():
                if theirs in level:
                    put(f"{place}.{ours}.conv", level[theirs]["Conv_0"])
    put("quant_conv", tree["quant_conv"])
    put("post_quant_conv", tree["post_quant_conv"])
    state["quantize.embedding.weight"] = torch.from_numpy(tree["quantize"]["embeddings"].copy())
    return state


def _diffusers_state(state: dict[str, torch.Tensor], attention: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """taming's state under diffusers' names; `attention` are its five names of an attention block's layers."""
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        part, *rest = name.split(".")
        match rest:
            case ["down" | "up" as way, level, kind, *end]:
                level = level if way == "down" else str(4 - int(level))
                kinds = {"block": "resnets", "attn": "attentions", "downsample": "downsamplers.0"}
                rest = [f"{way}_blocks", level, kinds.get(kind, "upsamplers.0"), *end]
            case ["mid", "attn_1", *end]:
                rest = ["mid_block", "attentions", "0", *end]
            case ["mid", block, *end]:
                rest = ["mid_block", "resnets", "0" if block == "block_1" else "1", *end]
            case ["norm_out", *end]:
                rest = ["conv_norm_out", *end]
        rest = ["conv_shortcut" if word == "nin_shortcut" else word for word in rest]
        if "attentions" in rest:
            layer = dict(zip(("norm", "q", "k", "v", "proj_out"), attention, strict=True))[rest[-2]]
            rest[-2] = layer
            tensor = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
        renamed[".".join([part, *rest])] = tensor.clone().contiguous()
    return renamed


def _taming_config(config: VQGANConfig) -> str:
    sizes: dict[str, Any] = {"double_z": False, "z_channels": config.z_channels, "resolution": 256, "in_channels": 3}
    sizes |= {"out_ch": 3, "ch": config.ch, "ch_mult": list(config.ch_mult), "num_res_blocks": config.num_res_blocks}
    sizes |= {"attn_resolutions": list(config.attn_resolutions), "dropout": 0.0}
    params = {"embed_dim": config.embed_dim, "n_embed": config.num_codes, "ddconfig": sizes}
    return yaml.safe_dump({"model": {"target": "taming.models.vqgan.VQModel", "params": params}})


def _diffusers_config(config: VQGANConfig) -> str:
    return json.dumps(
        {
            **{"_class_name": "VQModel", "act_fn": "silu", "in_channels": 3, "out_channels": 3, "norm_num_groups": 32},
            "block_out_channels": [config.ch * mult for mult in config.ch_mult],
            "layers_per_block": config.num_res_blocks,
            "latent_channels": config.z_channels,
            "num_vq_embeddings": config.num_codes,
            "vq_embed_dim": None if config.embed_dim == config.z_channels else config.embed_dim,
            "mid_block_add_attention": config.mid_attention,
        }
    )


@pytest.fixture
def lightning() -> Iterator[type]:
    """A class under the name that Lightning's callback has, as training checkpoints hold it."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    made = {part: types.ModuleType(part) for part in (name, name.rpartition(".")[0], "pytorch_lightning")}
    callback = type("ModelCheckpoint", (), {"__module__": name})
    made[name].ModelCheckpoint = callback  # type: ignore[attr-defined]
    sys.modules.update(made)
    yield callback
    for part in made:
        del sys.modules[part]


def _checkpoint(state: dict[str, torch.Tensor], callback: type) -> dict[str, Any]:
    """What Lightning saves of a VQGAN: loss and discriminator, optimizer, callbacks by class, hyperparameters."""
    loss = {
        "loss.discriminator.main.0.weight": torch.ones(3, 3),
        "loss.perceptual_loss.scaling_layer.shift": torch.ones(3),
    }
    held = callback()
    held.monitor, held.best = "val/rec_loss", np.float64(0.3)
    adam = {"step": 7, "exp_avg": torch.zeros(5, 2), "betas": (0.5, 0.9), "seen": {1, 2}}
    return {
        **{"epoch": 3, "global_step": 9, "pytorch-lightning_version": "1.0.8"},
        "state_dict": OrderedDict({**state, **loss}),
        "optimizer_states": [{"state": {0: adam}, "param_groups": [{"lr": 4.5e-6, "params": [0]}]}],
        "callbacks": {callback: {"best_model_score": torch.tensor(0.3), "path": Path("a.ckpt"), "held": held}},
        "hyper_parameters": {"dtype": torch.float32, "size": torch.Size([3])},
    }


# --- the tests -----------------------------------------------------------------------------------------------------


def test_every_family_of_one_model_gives_the_codes_that_the_releases_layers_define(
    tmp_path: Path, lightning: type
) -> None:
    tree = _random_tree(QUARTER, seed=1)
    state = _taming_state(tree)
    files = {name: tmp_path / name for name in ("lwm", "last.ckpt", "plain.safetensors", "d/diffusion.safetensors")}
    files["lwm"].write_bytes(pickle.dumps(tree))
    torch.save(_checkpoint(state, lightning), files["last.ckpt"])
    files["last.ckpt"].with_suffix(".yaml").write_text(_taming_config(QUARTER))
    save_file(state, files["plain.safetensors"])
    files["d/diffusion.safetensors"].parent.mkdir()
    save_file(_diffusers_state(state, ("",) * 5), files["d/diffusion.safetensors"])
    (tmp_path / "d" / "config.json").write_text(_diffusers_config(QUARTER))

    specs = {
        name: import_vision_tokenizer(file, tmp_path / "out" / f"{file.stem}.yaml") for name, file in files.items()
    }
    assert {spec.config for spec in specs.values()} == {QUARTER}
    assert len({spec.sha256 for spec in specs.values()}) == 1, "one set of weights, one file"

    picture = _pictures(1)
    codes = load_vision_tokenizer(tmp_path / "out" / "lwm.yaml").encode(picture)[0]
    assert len(set(codes.tolist())) > 30
    np.testing.assert_array_equal(codes, _release_codes(tree, picture[0]))


def test_the_release_at_full_size_is_imported_and_gives_the_codes_that_its_layers_define(tmp_path: Path) -> None:
    tree = _random_tree(RELEASE, seed=2)
    source = tmp_path / "vqgan"
    with open(source, "wb") as file:
        pickle.dump(tree, file)
    try:
        assert 584_900_000 < source.stat().st_size < 585_100_000
        spec = import_vision_tokenizer(source, tmp_path / "lwm.yaml", layout="lwm")
        assert spec.config == RELEASE
        model = load_vision_tokenizer(tmp_path / "lwm.yaml").model
        assert sum(weight.numel() for weight in model.parameters()) == 146_244_675
        corner = _pictures(1)[0, :64, :64]  # all layers; in float64 a sixteenth of a picture takes long enough
        with torch.inference_mode():
            codes = model.codes(model.vectors(torch.from_numpy(corner / 127.5 - 1).float().permute(2, 0, 1)[None]))
        assert len(set(codes[0].tolist())) > 8
        np.testing.assert_array_equal(codes[0], _release_codes(tree, corner))
    finally:  # pytest keeps folders of tests; not 1.2 GB
        source.unlink()
        (tmp_path / "lwm.safetensors").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "attention",
    [("group_norm", "to_q", "to_k", "to_v", "to_out.0"), ("group_norm", "query", "key", "value", "proj_attn")],
    ids=["names of today", "names of before"],
)
def test_attention_is_found_by_its_tensors_and_keeps_its_place(tmp_path: Path, attention: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    state = VQGAN(ATTENDED).state_dict()
    assert sum(".attn" in name for name in state) == 10 * (2 + 1 + 2)
    torch.save(state, tmp_path / "t.pt")
    save_file(_diffusers_state(state, attention), tmp_path / "d.safetensors")
    (tmp_path / "config.json").write_text(_diffusers_config(ATTENDED))
    specs = [import_vision_tokenizer(tmp_path / name, tmp_path / "o" / "x.yaml") for name in ("t.pt", "d.safetensors")]
    assert specs[0].config == specs[1].config == ATTENDED
    assert specs[0].sha256 == specs[1].sha256
    for name, tensor in load_file(specs[0].weights).items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)


@pytest.fixture(scope="module")
def tiny_tree() -> dict[str, Any]:
    return _random_tree(TINY, seed=3)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_importing_again_gives_the_same_bytes_whatever_the_protocol(
    tmp_path: Path, tiny_tree: dict[str, Any], protocol: int
) -> None:
    (tmp_path / "vqgan").write_bytes(pickle.dumps(tiny_tree, protocol))
    first = import_vision_tokenizer(tmp_path / "vqgan", tmp_path / "new" / "a.yaml")
    weights, text = Path(first.weights).read_bytes(), (tmp_path / "new" / "a.yaml").read_text()
    assert import_vision_tokenizer(tmp_path / "vqgan", tmp_path / "new" / "a.yaml") == first
    assert (Path(first.weights).read_bytes(), (tmp_path / "new" / "a.yaml").read_text()) == (weights, text)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.safetensors", "a.yaml"]
    assert read_vision_tokenizer_spec(tmp_path / "new" / "a.yaml") == first
    assert str(tmp_path) not in text, "a tokenizer that ships tells nothing of this machine"
    assert torch.equal(load_file(first.weights)["quant_conv.weight"], _taming_state(tiny_tree)["quant_conv.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_weights_keep_their_dtype_and_the_spec_says_what_is_computed_in(
    tmp_path: Path, tiny_tree: dict[str, Any], dtype: torch.dtype, suffix: str
) -> None:
    state = {name: tensor.to(dtype) for name, tensor in _taming_state(tiny_tree).items()}
    source = tmp_path / f"a.{suffix}"
    torch.save({"state_dict": state}, source) if suffix == "ckpt" else save_file(state, source)
    spec = import_vision_tokenizer(source, tmp_path / "b.yaml", dtype="bf16", name="a: b")
    assert (spec.dtype, spec.name) == ("bf16", "a: b")
    assert read_vision_tokenizer_spec(tmp_path / "b.yaml") == spec
    kept = load_file(spec.weights)
    assert {tensor.dtype for tensor in kept.values()} == {dtype}
    assert all(torch.equal(kept[name], state[name]) for name in state)


def test_tensors_that_share_a_storage_are_written_apart(tmp_path: Path, tiny_tree: dict[str, Any]) -> None:
    state = _taming_state(tiny_tree)
    both = torch.stack([state["encoder.conv_in.bias"], state["decoder.norm_out.bias"]])
    torch.save(state | {"encoder.conv_in.bias": both[0], "decoder.norm_out.bias": both[1]}, tmp_path / "shared.pt")
    torch.save(state, tmp_path / "apart.pt")
    specs = [
        import_vision_tokenizer(tmp_path / f"{name}.pt", tmp_path / "o" / f"{name}.yaml")
        for name in ("shared", "apart")
    ]
    assert specs[0].sha256 == specs[1].sha256


class _Touch:
    """Pickled, it is a shell command that leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("place", ["pickle", "leaf", "zip", "state_dict", "callbacks"])
def test_a_command_in_a_file_is_refused_by_name_and_not_run(
    tmp_path: Path, tiny_tree: dict[str, Any], place: str
) -> None:
    marker, source = tmp_path / "was-run", tmp_path / "weights"
    touch, state = _Touch(marker), _taming_state(tiny_tree)
    if place in ("pickle", "leaf"):
        source.write_bytes(pickle.dumps(touch if place == "pickle" else tiny_tree | {"quant_conv": touch}))
    else:
        in_state = state | {"quant_conv.bias": touch}
        torch.save(
            {"zip": touch, "state_dict": in_state, "callbacks": {"state_dict": state, "callbacks": touch}}[place],
            source,
        )
    with pytest.raises(ValueError, match=r"weights: .*it asks for 'posix.system'"):
        import_vision_tokenizer(source, tmp_path / "o.yaml")
    assert not marker.exists() and not (tmp_path / "o.yaml").exists()


def test_what_torchs_pickles_name_beside_tensors_is_not_called(tmp_path: Path, tiny_tree: dict[str, Any]) -> None:
    """A name of torch itself may stand in a checkpoint, and some of torch's functions load or compile code."""

    class Load:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch.jit.load, ("nowhere",)

    torch.save({"state_dict": _taming_state(tiny_tree), "hyper_parameters": Load()}, tmp_path / "a.ckpt")
    assert import_vision_tokenizer(tmp_path / "a.ckpt", tmp_path / "o.yaml").config == TINY


def _bad_files(folder: Path, tree: dict[str, Any]) -> dict[str, tuple[Callable[[], object], str]]:
    """What is wrong, how to write it to `folder / "weights"`, what the error says."""
    path = folder / "weights"
    state = _taming_state(tree)
    good = pickle.dumps(tree)

    def cut(write: Callable[[], object], share: float) -> None:
        write()
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    def packed() -> None:
        torch.save(state, folder / "whole")
        with zipfile.ZipFile(folder / "whole") as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for member in whole.infolist():
                archive.writestr(member.filename, whole.read(member))

    def without(*keys: str) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in state.items() if name not in keys}

    def zipped(**members: bytes) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name.replace("__", "/"), data)

    def legacy() -> None:
        torch.save(state, path, _use_new_zipfile_serialization=False)

    def changed(name: str, tensor: torch.Tensor) -> None:
        save_file(state | {name: tensor.contiguous()}, path)

    def flipped() -> None:
        torch.save(state, path)
        data = path.read_bytes()
        at = data.index(state["quant_conv.weight"].numpy().tobytes())
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])

    holes = state["encoder.conv_out.weight"].clone()
    holes.view(-1)[:3] = float("nan")
    once = {"quant_conv": tree["quant_conv"], "encoder": {"a": tree["encoder"]["Conv_0"]["kernel"]}}
    lattice: Any = {"kernel": np.zeros((256, 256), np.float32)}
    for _ in range(8):
        lattice = {"a": lattice, "b": lattice}
    expanded = torch.zeros(1).expand(1 << 20, 1 << 20)
    return {
        "no file": (lambda: None, "no such file"),
        "an empty file": (lambda: path.write_bytes(b""), "begins with b''; wanted a checkpoint"),
        "a web page": (lambda: path.write_text("<!doctype html><p>not found</p>"), "begins with .*web page"),
        "a cut pickle": (lambda: path.write_bytes(good[:-5000]), "byte .*nested dicts of numpy arrays"),
        "a cut checkpoint": (lambda: cut(lambda: torch.save(state, path), 0.7), "a damaged zip"),
        "a flipped bit in a checkpoint": (flipped, "storage '.*' is damaged"),
        "a cut safetensors": (lambda: cut(lambda: save_file(state, path), 0.7), "not a whole safetensors file"),
        "a safetensors of noise": (lambda: path.write_bytes(b"\x40" + b"\0" * 7 + b"{" + b"x" * 99), "not a whole saf"),
        "a zip that is no checkpoint": (lambda: zipped(a__b=b"c"), "a zip that torch.save did not write"),
        "a zip with a pickle of text": (lambda: zipped(**{"a__data.pkl": pickle.dumps("b")}), "no dict of tensors"),
        "a packed zip": (packed, "is packed"),
        "a checkpoint of before torch 1.6": (legacy, "save it again with torch.save"),
        "a tensor of nothing, expanded": (lambda: torch.save({"a": expanded}, path), "a tensor of shape"),
        "a pickle of a list": (lambda: path.write_bytes(pickle.dumps([1])), "holds list; wanted dicts with arrays"),
        "a pickle of numbers": (lambda: path.write_bytes(pickle.dumps({"a": 1})), "'a' holds int"),
        "a pickle of whole numbers": (
            lambda: path.write_bytes(pickle.dumps({"a": np.arange(3)})),
            "no array of floats",
        ),
        "one array, many times": (
            lambda: path.write_bytes(pickle.dumps(lattice)),
            "wanted each array to be there once",
        ),
        "another model's tree": (lambda: path.write_bytes(pickle.dumps(once)), "wanted a VQGAN, with a tensor named"),
        "another model": (lambda: save_file({"model.embed": torch.ones(2)}, path), "1 tensors, 'model.embed' .*wanted"),
        "missing tensors": (
            lambda: torch.save(without("post_quant_conv.bias"), path),
            "1 missing: post_quant_conv.bias",
        ),
        "no codebook": (lambda: torch.save(without("quantize.embedding.weight"), path), "no tensor quantize.embedding"),
        "an unexpected tensor": (lambda: changed("encoder.extra", torch.ones(3)), "1 unexpected: 'encoder.extra'"),
        "a wrong shape": (
            lambda: changed("decoder.conv_out.weight", state["decoder.conv_out.weight"][:2]),
            r"1 of another shape: decoder.conv_out.weight \[2, 32, 3, 3\] \(wanted \[3, 32, 3, 3\]\)",
        ),
        "a kernel of two dims": (
            lambda: path.write_bytes(pickle.dumps(tree | {"quant_conv": {"kernel": np.ones((4, 8), np.float32)}})),
            r"'quant_conv/kernel': got shape \[4, 8\]; wanted \[height, width, in, out\]",
        ),
        "too many codes": (lambda: changed("quantize.embedding.weight", torch.ones(16384, 4)), "num_codes: got 16384"),
        "an odd width": (
            lambda: changed("encoder.down.2.block.0.conv1.weight", torch.ones(33, 32, 3, 3)),
            "multiples of",
        ),
        "four levels": (
            lambda: save_file({n: t for n, t in state.items() if not n.startswith("encoder.down.4")}, path),
            "got 4 levels",
        ),
        "a VAE": (lambda: changed("encoder.conv_out.weight", torch.ones(16, 64, 3, 3)), "double_z"),
        "nan": (lambda: changed("encoder.conv_out.weight", holes), "encoder.conv_out.weight: 3 of .* nan or infinite"),
        "whole numbers": (lambda: changed("quant_conv.bias", torch.ones(4, dtype=torch.int32)), "got torch.int32"),
    }


@pytest.mark.parametrize("name", _bad_files(Path(), _random_tree(TINY, 0)))
def test_a_bad_file_is_named_with_what_was_wanted_and_nothing_is_written(
    tmp_path: Path, tiny_tree: dict[str, Any], name: str
) -> None:
    write, message = _bad_files(tmp_path, tiny_tree)[name]
    write()
    with pytest.raises(ValueError, match=rf"^{tmp_path}/weights: .*{message}") as caught:
        import_vision_tokenizer(tmp_path / "weights", tmp_path / "o" / "o.yaml")
    assert len(str(caught.value)) < 1500
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_taming_config(TINY).replace("ch: 32", "ch: 64"), r"c.yaml: ch: got 64; the weights of a.ckpt have 32"),
        (_taming_config(TINY).replace("n_embed: 64", "n_embed: 65"), "n_embed: got 65"),
        (_taming_config(TINY).replace("double_z: false", "double_z: true"), "double_z: got True"),
        (_diffusers_config(TINY).replace('"norm_num_groups": 32', '"norm_num_groups": 16'), "norm_num_groups: got 16"),
        (
            _diffusers_config(TINY).replace("null", "9").replace('_embed_dim": 4', '_embed_dim": 9'),
            "vq_embed_dim: got 9",
        ),
        ("kind: dataset\n", "wanted taming's config"),
        ("a: [", "not yaml"),
        ("a: !!python/object/apply:os.system [ls]", "not yaml"),
        ("a: &a [1]\nb: [*a, *a]", "aliases"),
    ],
)
def test_a_config_of_another_model_is_refused(
    tmp_path: Path, tiny_tree: dict[str, Any], text: str, message: str
) -> None:
    torch.save(_taming_state(tiny_tree), tmp_path / "a.ckpt")
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        import_vision_tokenizer(tmp_path / "a.ckpt", tmp_path / "o" / "o.yaml", config=tmp_path / "c.yaml")
    assert not (tmp_path / "o").exists()


def test_a_config_beside_the_file_is_held_against_it_and_one_of_another_kind_is_not(
    tmp_path: Path, tiny_tree: dict[str, Any]
) -> None:
    torch.save(_taming_state(tiny_tree), tmp_path / "a.ckpt")
    (tmp_path / "a.yaml").write_text(_taming_config(TINY).replace("embed_dim: 4", "embed_dim: 8"))
    with pytest.raises(ValueError, match=r"a.yaml: embed_dim: got 8; the weights of a.ckpt have 4"):
        import_vision_tokenizer(tmp_path / "a.ckpt", tmp_path / "o.yaml")
    (tmp_path / "a.yaml").write_text("kind: vision_tokenizer\nname: older\n")
    assert import_vision_tokenizer(tmp_path / "a.ckpt", tmp_path / "o.yaml").config == TINY


def test_what_is_read_is_never_overwritten(tmp_path: Path, tiny_tree: dict[str, Any]) -> None:
    save_file(_taming_state(tiny_tree), tmp_path / "a.safetensors")
    (tmp_path / "b.yaml").write_text(_taming_config(TINY))
    before = (tmp_path / "a.safetensors").read_bytes()
    for out, config in (("a.yaml", None), ("b.yaml", tmp_path / "b.yaml")):
        with pytest.raises(ValueError, match="would take the place of what is read"):
            import_vision_tokenizer(tmp_path / "a.safetensors", tmp_path / out, config=config)
    with pytest.raises(ValueError, match=r"wanted a name that ends in .yaml"):
        import_vision_tokenizer(tmp_path / "a.safetensors", tmp_path / "c.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_a_wrong_layout_is_refused(tmp_path: Path, tiny_tree: dict[str, Any]) -> None:
    (tmp_path / "vqgan").write_bytes(pickle.dumps(tiny_tree))
    for layout in ("taming", "diffusers"):
        with pytest.raises(ValueError, match=r"vqgan: has no tensor encoder.conv_in.weight"):
            import_vision_tokenizer(tmp_path / "vqgan", tmp_path / "o.yaml", layout=layout)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--layout: got 'flax'"):
        import_vision_tokenizer(tmp_path / "vqgan", tmp_path / "o.yaml", layout="flax")  # type: ignore[arg-type]


def test_a_write_that_fails_leaves_the_tokenizer_of_before(
    tmp_path: Path, tiny_tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(_taming_state(tiny_tree), tmp_path / "a.ckpt")
    spec = import_vision_tokenizer(tmp_path / "a.ckpt", tmp_path / "o" / "o.yaml")
    other = _taming_state(_random_tree(TINY, seed=9))
    torch.save(other, tmp_path / "b.ckpt")

    def full(path: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lwm_data.vision.weights.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        import_vision_tokenizer(tmp_path / "b.ckpt", tmp_path / "o" / "o.yaml")
    monkeypatch.undo()
    assert read_vision_tokenizer_spec(tmp_path / "o" / "o.yaml") == spec
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["o.safetensors", "o.yaml"]
    shutil.rmtree(tmp_path / "o")
    assert isinstance(import_vision_tokenizer(tmp_path / "b.ckpt", tmp_path / "o" / "o.yaml"), VisionTokenizerSpec)
