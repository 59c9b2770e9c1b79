"""Tensors by name from a file of weights, whatever its container, without running anything that stands in it.

first bytes      container                                   tensors are
PK\\3\\4           zip of torch.save, Lightning's too          views of the mapped file
length, {        safetensors                                 read by safetensors
\\x80             pickle of nested dicts of arrays: the       copies; names joined by "/":
                 LWM release's file                          encoder/Conv_0/kernel
"""

from __future__ import annotations

import io
import math
import mmap
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lwm_data.vision.inert_pickle import ArrayData, Inert, Named, PickleReader

MAX_PICKLE = 4 << 30  # bytes of the release's file, which has 585 MB; its arrays are copied to memory
MAX_ZIP_PICKLE = 64 << 20  # bytes of the pickle in a zip; the tensors lie outside of it
MAX_ZIP_MEMBERS = 50_000
MAX_DEPTH = 16  # of nested dicts
MAX_TENSORS = 10_000
LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began before version 1.6
STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
# What a training checkpoint carries beside its tensors: callbacks, hyperparameters, the state of optimizers. Such
# names may stand in it; what they would make is left out.
LIGHTNING = frozenset(
    {"pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "taming", "main", "__main__", "torch", "numpy"}
    | {"argparse", "collections", "enum", "pathlib", "typing", "datetime"}
)
PLAIN = ("dict", "list", "tuple", "set", "frozenset", "int", "float", "str", "bool", "object", "complex")


def read_weight_file(path: Path) -> dict[str, Tensor]:
    """The tensors of `path` by name, on the CPU, in the dtype that they have there.

    ValueError for anything that is not one of the containers above, whole, with tensors in it.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; wanted a file of VQGAN weights")
    with open(path, "rb") as file:
        start = file.read(16)
    try:
        if start[:4] == b"PK\3\4":
            return _torch_zip(path)
        if start[8:9] == b"{" and 1 < int.from_bytes(start[:8], "little") < path.stat().st_size:
            return _safetensors(path)
        if start.startswith(LEGACY_TORCH):
            raise ValueError("written by torch before 1.6; open it with torch and save it again with torch.save")
        if start[:1] == b"\x80":
            return _release_pickle(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    raise ValueError(
        f"{path}: begins with {start[:8]!r}; wanted a checkpoint of torch.save, a safetensors file, or the LWM "
        "release's pickled VQGAN (a download that was cut short or is a web page begins otherwise)"
    )


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in sorted(file.keys())}
    except SafetensorError as error:
        raise ValueError(f"not a whole safetensors file: {error}; fetch or write it again") from error


def _mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch warns of buffers that are read-only


def _release_pickle(path: Path) -> dict[str, Tensor]:
    num_bytes = path.stat().st_size
    if num_bytes > MAX_PICKLE:
        raise ValueError(f"a pickle of {num_bytes:,} bytes; wanted at most {MAX_PICKLE:,}, the release's has 585 MB")
    with _mapped(path) as stream:
        try:
            tree = PickleReader().read(stream, num_bytes)
        except ValueError as error:
            raise ValueError(
                f"{error}; wanted a pickle of nested dicts of numpy arrays, as the LWM release's VQGAN is"
            ) from error
    leaves: dict[str, ArrayData] = {}
    _flatten(tree, "", leaves)
    if not leaves:
        raise ValueError("a pickle without arrays; wanted nested dicts of numpy arrays")
    total = sum(leaf.array.nbytes for leaf in leaves.values() if leaf.array is not None)
    if total > num_bytes:
        raise ValueError(f"arrays of {total:,} bytes in a file of {num_bytes:,}; wanted each array to be there once")
    tensors = {}
    del tree
    for name in sorted(leaves):
        array = leaves.pop(name).array
        if array is None or array.dtype.kind != "f":
            raise ValueError(f"{name!r} is no array of floats, but {'empty' if array is None else array.dtype}")
        tensors[name] = torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))
    return tensors


def _flatten(tree: object, name: str, leaves: dict[str, ArrayData], depth: int = 0) -> None:
    if isinstance(tree, ArrayData):
        if len(leaves) == MAX_TENSORS:
            raise ValueError(f"more than {MAX_TENSORS:,} arrays")
        leaves[name] = tree
        return
    if not isinstance(tree, dict) or not tree:  # an empty dict, again and again, would cost time and give nothing
        raise ValueError(
            f"{name or 'the pickle'!r} holds {type(tree).__name__}; wanted dicts with arrays, as the LWM release's"
        )
    if depth == MAX_DEPTH:
        raise ValueError(f"dicts nested deeper than {MAX_DEPTH}")
    for key, value in tree.items():
        if not isinstance(key, str) or "/" in key:
            raise ValueError(f"{name or 'the pickle'!r} has a key that is no name of a layer")
        _flatten(value, f"{name}/{key}" if name else key, leaves, depth + 1)


def _inert(*arguments: object) -> Inert:
    return Inert()


def _first(tensor: object, *rest: object) -> object:
    return tensor


def _empty_dict(*arguments: object) -> dict[Any, Any]:
    return {}  # its items follow by instructions of their own


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    numel: int
    start: int  # byte in the file


def _torch_zip(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
            found = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(found) != 1 or len(members) > MAX_ZIP_MEMBERS:
                raise ValueError("a zip that torch.save did not write; wanted one with NAME/data.pkl in it")
            program = members[found[0]]
            if program.file_size > MAX_ZIP_PICKLE or program.compress_type != zipfile.ZIP_STORED:
                raise ValueError(
                    f"{program.filename!r} is packed or has over {MAX_ZIP_PICKLE:,} bytes; save it with torch"
                )
            data = archive.read(program)
            order = f"{program.filename.removesuffix('data.pkl')}byteorder"
            if order in members and archive.open(members[order]).read(6) != b"little":
                raise ValueError("big-endian tensors; save the checkpoint again on a little-endian machine")
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"a damaged zip: {error}; wanted a whole checkpoint of torch.save, fetch it again") from error
    memory = _mapped(path)
    reader = _ZipTensors(memory, members, program.filename.removesuffix("data.pkl"))
    functions: dict[str, Callable[..., object]] = {
        **{f"{module}.{name}": _inert for module in ("builtins", "__builtin__") for name in PLAIN},
        "torch._utils._rebuild_tensor_v2": reader.tensor,
        "torch._utils._rebuild_parameter": _first,
        "collections.OrderedDict": _empty_dict,
    }
    try:
        value = PickleReader(functions, LIGHTNING, reader.storage).read(io.BytesIO(data), len(data))
    except ValueError as error:
        raise ValueError(f"{program.filename}: {error}; wanted a checkpoint with tensors in `state_dict`") from error
    if isinstance(value, dict) and "state_dict" in value:
        value = value["state_dict"]
    if not isinstance(value, dict):
        raise ValueError("no dict of tensors; wanted a checkpoint with tensors in `state_dict`")
    tensors = {name: tensor for name, tensor in value.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    if not tensors or len(tensors) > MAX_TENSORS:
        raise ValueError(f"{len(tensors):,} tensors; wanted a checkpoint with tensors in `state_dict`")
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > len(memory):
        raise ValueError(f"tensors of {total:,} bytes in a file of {len(memory):,}; wanted each to be there once")
    return {name: tensors[name] for name in sorted(tensors)}


class _ZipTensors:
    """What torch's pickle says of tensors, as views of the mapped file."""

    def __init__(self, memory: mmap.mmap, members: dict[str, zipfile.ZipInfo], folder: str) -> None:
        self.memory, self.members, self.folder = memory, members, folder
        self.whole: set[str] = set()  # storages whose checksum is right

    def storage(self, reference: object) -> _Storage:
        """('storage', torch.FloatStorage, '0', 'cpu', 1000): the member NAME/data/0 has 1000 floats."""
        match reference:
            case ("storage", Named(name=kind), str(key), str(), int(numel)) if kind in STORAGES and numel >= 0:
                pass
            case _:
                raise ValueError("a reference to something that is no storage of numbers")
        member = self.members.get(f"{self.folder}data/{key}")
        if member is None or member.header_offset < 0:
            raise ValueError(f"storage {key[:40]!r} is not in the zip")
        # Where the data begin stands in the member's own header: the lengths of two fields after its 30 bytes.
        header = self.memory[member.header_offset : member.header_offset + 30]
        start = member.header_offset + 30 + int.from_bytes(header[26:28], "little")
        start += int.from_bytes(header[28:30], "little")
        dtype = STORAGES[kind]
        wanted = numel * dtype.itemsize
        if member.compress_type != zipfile.ZIP_STORED or member.file_size < wanted:
            raise ValueError(f"storage {key!r} is packed or has {member.file_size:,} bytes; wanted {wanted:,}")
        end = start + member.file_size
        if header[:4] != b"PK\3\4" or end > len(self.memory):
            raise ValueError(f"storage {key!r} lies outside of the file")
        if key not in self.whole and zlib.crc32(memoryview(self.memory)[start:end]) != member.CRC:
            raise ValueError(f"storage {key!r} is damaged, its CRC-32 differs: fetch it again")
        self.whole.add(key)
        return _Storage(dtype, numel, start)

    def tensor(self, storage: object, offset: object, size: object, stride: object, *rest: object) -> Tensor:
        """torch's `_rebuild_tensor_v2`, with the checks that it leaves out."""
        if not isinstance(storage, _Storage):
            raise ValueError("a tensor without a storage")
        shape: tuple[int, ...] = _sizes(size)
        steps = _sizes(stride)
        (first,) = _sizes((offset,))
        if len(shape) != len(steps):
            raise ValueError("a tensor with as many sizes as strides")
        last = first + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
        count = math.prod(shape)
        if count > storage.numel or (count and last >= storage.numel):
            raise ValueError(f"a tensor of shape {list(shape)} in a storage of {storage.numel:,} numbers")
        if not count:
            return torch.empty(shape, dtype=storage.dtype)
        whole = torch.frombuffer(self.memory, dtype=storage.dtype, count=storage.numel, offset=storage.start)
        return whole.as_strided(shape, steps, first)


def _sizes(value: object) -> tuple[int, ...]:
    if not (isinstance(value, tuple) and len(value) <= 8 and all(type(n) is int and 0 <= n < 1 << 40 for n in value)):
        raise ValueError("a tensor with unusable sizes")
    return value
