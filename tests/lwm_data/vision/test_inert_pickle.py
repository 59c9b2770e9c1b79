"""A pickle is read as data: what it means is what pickle says, and nothing that it asks for happens."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_data.vision.inert_pickle import ArrayData, PickleReader

SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=9)
)
TREES = st.recursive(
    SCALARS | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5), inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
    ),
    max_leaves=12,
)
DTYPES = [np.float16, np.float32, np.float64, np.int32, np.uint8, np.dtype(">f4")]


def _read(data: bytes) -> Any:
    return PickleReader().read(io.BytesIO(data), len(data))


def _small() -> bytes:
    rng = np.random.default_rng(0)
    return pickle.dumps(
        {"a": {"kernel": rng.normal(size=(3, 3, 2, 4)).astype(np.float32), "bias": np.zeros(4)}, "b": 1}
    )


@given(tree=TREES, protocol=st.integers(2, 5))
def test_plain_data_is_read_as_pickle_reads_it(tree: Any, protocol: int) -> None:
    assert _read(pickle.dumps({"tree": tree}, protocol)) == {"tree": tree}


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_are_read_as_pickle_reads_them(dtype: Any, order: Any, protocol: int) -> None:
    array = np.array(np.random.default_rng(1).normal(size=(2, 3, 5)) * 9, dtype=dtype, order=order)
    for one in (array, array[:, :0], array[0, 0, 0], array[..., 1]):
        read = _read(pickle.dumps([one, one], protocol))
        assert isinstance(read[0], ArrayData) and read[0].array is not None
        assert read[0].array.dtype == one.dtype
        np.testing.assert_array_equal(read[0].array, one)


def test_numpy_1_and_2_name_their_functions_otherwise_and_both_are_read() -> None:
    new = pickle.dumps(np.arange(4.0), protocol=2)
    assert b"numpy._core" in new
    read = _read(new.replace(b"numpy._core", b"numpy.core"))
    np.testing.assert_array_equal(read.array, np.arange(4.0))


def test_jax_arrays_and_frozen_dicts_are_read_as_their_arrays() -> None:
    read = _read(pickle.dumps({"scale": jnp.arange(6.0).reshape(2, 3)}))
    np.testing.assert_array_equal(read["scale"].array, np.arange(6.0).reshape(2, 3))
    inner = pickle.dumps({"scale": 7}, protocol=2)[2:-1]
    assert _read(b"\x80\x02cflax.core.frozen_dict\nFrozenDict\n" + inner + b"\x85R.") == {"scale": 7}


class _Calls:
    """Pickled, it is a call of `function`."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_call_that_a_pickle_asks_for_is_named_and_not_made(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "was-run"
    calls = [
        (_Calls(os.system, f"touch {marker}"), "posix.system"),
        (_Calls(eval, f"open({str(marker)!r}, 'w')"), r"\w+.eval"),
        (_Calls(subprocess.Popen, ["touch", str(marker)]), r"(subprocess|commands).Popen"),
        (_Calls(open, str(marker), "w"), r"\w+.open"),
        (_Calls(Path.touch, marker), r"\w+.getattr|pathlib"),
        (_Calls(np.fromfile, str(marker)), "numpy.*fromfile"),
        (_Calls(np.lib.format.open_memmap, str(marker), "w+", "f4", (1,)), "numpy.*open_memmap"),
    ]
    for call, name in calls:
        for tree in (call, {"encoder": {"kernel": call}}, [np.zeros(2), call]):
            with pytest.raises(ValueError, match=rf"byte \d+: it asks for '({name})"):
                _read(pickle.dumps(tree, protocol))
    assert not marker.exists()
    pickle.loads(pickle.dumps(calls[0][0], protocol))
    assert marker.exists(), "these pickles do run when they are loaded"


@given(at=st.integers(0, 400), byte=st.integers(0, 255), cut=st.none() | st.integers(0, 400))
def test_damage_gives_a_value_error_or_other_data_and_nothing_else(at: int, byte: int, cut: int | None) -> None:
    data = bytearray(_small())
    data[at % len(data)] = byte
    try:
        _read(bytes(data[:cut]))
    except ValueError as error:
        assert str(error).startswith("byte ")


BOMBS = {
    "bytes that are not there": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"abc.",
    "text that is not there": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"abc.",
    "a bytearray that is not there": b"\x80\x05\x96" + struct.pack("<Q", (1 << 63) - 1) + b"abc.",
    "a place in the memo, far away, and nothing there": b"\x80\x02}r\xff\xff\xff\xff0j\xfe\xff\xff\xff.",
    "an array without its bytes": b"\x80\x03cnumpy._core.multiarray\n_reconstruct\n"
    b"cnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    b"(K\x01\x8a\x06\x00\x00\x00\x00\x00\x01\x85cnumpy\ndtype\nX\x02\x00\x00\x00f4\x85R\x89C\x04abcdtb.",
    "bytes of text, again and again": b"\x80\x02X"
    + struct.pack("<I", 1 << 20)
    + b"a" * (1 << 20)
    + b"q\x000X\x06\x00\x00\x00latin1q\x01]"
    + b"c_codecs\nencode\nh\x00h\x01\x86Ra" * 400
    + b".",
    "a number as long as the file": b"\x80\x02\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20) + b".",
    "a number of 5,000 digits": b"I" + b"9" * 5000 + b"\n.",
    "a key nested too deep to hash": b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"K\x01s.",
    "more lists than weights can have": b"\x80\x02" + b"]" * 500_000 + b".",
    "a stack that is empty": b"\x80\x02RRR.",
    "a mark that was never set": b"\x80\x02t.",
    "an extension": b"\x80\x02\x82\x01.",
    "a class of old": b"(ios\nsystem\n.",
    "an array of objects": pickle.dumps(np.array([{}, None], dtype=object)),
    "an array of text": pickle.dumps(np.array(["a", "b"])),
    "an array of records": pickle.dumps(np.zeros(2, dtype="f4,i4")),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_short_file_cannot_take_much_memory(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"^byte "):
            _read(BOMBS[name])
        assert tracemalloc.get_traced_memory()[1] < 150 << 20
    finally:
        tracemalloc.stop()
