"""Reads a pickle as data. Nothing that it names is imported, looked up or called, so it cannot run anything.

    b"\\x80\\x04}\\x8c\\x06kernel..."     the file: a program for a small stack machine
      pickletools.genops                its instructions, one by one
      the machine below                 dicts, lists, tuples, text, numbers, bytes,
        "numpy.dtype" and ("f4", ...)     and a call of a *name*: ours where FUNCTIONS has that name,
        "posix.system" and ("rm", ...)    an error where it has not

numpy's arrays and dtypes, jax's arrays and flax's FrozenDict are understood, since the LWM release's file may hold
them; a caller may add names. A short file cannot ask for much memory: instructions are counted, a size that the file
states is checked against the bytes that are there, and arrays are views of those bytes.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

MAX_INSTRUCTIONS = 500_000  # the release's file has about 10,000, a Lightning checkpoint of a VQGAN about 50,000
MAX_DIMS = 8
DTYPES = {f"{kind}{size}" for kind, sizes in (("f", "248"), ("i", "1248"), ("u", "1248"), ("b", "1")) for size in sizes}

PUSHED = {  # instructions whose argument is their value
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class Named:
    """A class or function that the pickle names; only ever compared with names we know."""

    name: str


class Inert:
    """What a pickle makes by a call that its reader does not care for; state given to it is dropped."""


@dataclass
class DtypeData:
    """numpy's dtype of numbers: its code, and the byte order that the pickle sets afterwards."""

    code: str
    order: str = "="

    def set_state(self, state: object) -> None:
        if not (isinstance(state, tuple) and len(state) >= 2 and state[1] in ("<", ">", "|", "=")):
            raise ValueError("a dtype with an unknown state; wanted numbers in one byte order")
        self.order = state[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


@dataclass
class ArrayData:
    """numpy's array: empty until the pickle sets its state. `array` is a view of the pickle's bytes."""

    array: np.ndarray | None = None

    def set_state(self, state: object) -> None:
        if not (isinstance(state, tuple) and len(state) == 5):
            raise ValueError("an array with an unknown state; wanted version, shape, dtype, order, bytes")
        self.fill(state[4], state[2], state[1], "F" if state[3] is True else "C")

    def fill(self, data: object, dtype: object, shape: object, order: str) -> None:
        if not isinstance(dtype, DtypeData):
            raise ValueError("an array without a dtype of numbers")
        if not (isinstance(shape, tuple) and len(shape) <= MAX_DIMS and all(type(n) is int and n >= 0 for n in shape)):
            raise ValueError(f"an array with an unusable shape; wanted at most {MAX_DIMS} sizes")
        wanted = math.prod(shape) * dtype.dtype.itemsize
        if not isinstance(data, bytes | bytearray):
            raise ValueError("an array of Python objects; wanted an array of numbers, as bytes")
        if len(data) != wanted:
            raise ValueError(
                f"an array of shape {list(shape)} and dtype {dtype.code} with {len(data):,} bytes; wanted {wanted:,}"
            )
        flat = np.frombuffer(data, dtype.dtype) if data else np.empty(0, dtype.dtype)
        self.array = flat.reshape(shape, order="F" if order == "F" else "C")


def _dtype(code: object, *flags: object) -> DtypeData:
    if not isinstance(code, str) or code.lstrip("<>|=") not in DTYPES:
        shown = code.name if isinstance(code, Named) else repr(code)[:40] if isinstance(code, str) else "no text"
        raise ValueError(f"an array of dtype {shown}; wanted plain numbers: {', '.join(sorted(DTYPES))}")
    return DtypeData(code.lstrip("<>|="), code[0] if code[0] in "<>|=" else "=")


def _empty_array(subtype: object, shape: object, code: object) -> ArrayData:
    if subtype != Named("numpy.ndarray"):
        raise ValueError("an array of a class of its own; wanted numpy.ndarray")
    return ArrayData()


def _array_of(data: object, dtype: object, shape: object, order: object) -> ArrayData:
    array = ArrayData()
    array.fill(data, dtype, shape, "F" if order == "F" else "C")
    return array


def _scalar(dtype: object, data: object) -> ArrayData:
    return _array_of(data, dtype, (), "C")


def _jax_array(function: object, arguments: object, state: object, aval: object) -> ArrayData:
    array = ArrayData()
    array.set_state(state)
    return array


def _frozen_dict(items: object) -> dict[Any, Any]:
    if not isinstance(items, dict):
        raise ValueError("a FrozenDict of something that is no dict")
    return items


def _latin1(text: object, encoding: object) -> bytes:
    """How bytes are written by pickle's protocol 2. A call may repeat, so it may not make much of little."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("_codecs.encode of something that is not bytes as latin1 text")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""  # protocol 2 again


# Every call that is understood, by the name that the pickle gives it. numpy moved `core` to `_core` in version 2.
FUNCTIONS: Mapping[str, Callable[..., object]] = {
    "numpy.dtype": _dtype,
    "numpy.core.multiarray._reconstruct": _empty_array,
    "numpy._core.multiarray._reconstruct": _empty_array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _array_of,
    "numpy._core.numeric._frombuffer": _array_of,
    "jax._src.array._reconstruct_array": _jax_array,
    "flax.core.frozen_dict.FrozenDict": _frozen_dict,
    "_codecs.encode": _latin1,
    "__builtin__.bytes": _no_bytes,
}
ARGUMENTS = {"numpy.ndarray"}  # names that stand as an argument only


@dataclass
class PickleReader:
    """The machine. `persistent` makes a value of what the pickle refers to outside of itself (torch's storages).

    functions: calls that are understood, beside FUNCTIONS; inert: first parts of names that may stand in the file
    without meaning anything to us ("pytorch_lightning"); a call of such a name makes an Inert.
    """

    functions: Mapping[str, Callable[..., object]] = field(default_factory=dict)
    inert: frozenset[str] = frozenset()
    persistent: Callable[[object], object] | None = None

    def read(self, stream: IO[bytes] | Any, num_bytes: int) -> object:
        """The value of the pickle that begins where `stream` stands and has at most `num_bytes` bytes.

        stream: io.BytesIO or mmap, whose `read` never takes memory for more than is there.
        ValueError says what is wrong and at which byte.
        """
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._encoded = num_bytes
        at: int | None = 0
        try:
            for count, (opcode, argument, at) in enumerate(pickletools.genops(stream)):  # noqa: B007 (read below)
                if count == MAX_INSTRUCTIONS:
                    raise ValueError(f"more than {MAX_INSTRUCTIONS:,} instructions; weights need a tenth of that")
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._step(opcode.name, argument)
        except (IndexError, KeyError) as error:
            raise ValueError(f"byte {at}: damaged: a value is used that is not there") from error
        except ValueError as error:
            raise ValueError(f"byte {at}: {error}") from error
        raise AssertionError("genops ends with STOP or raises")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in PUSHED:
            if isinstance(argument, int) and argument.bit_length() > 64:
                raise ValueError("a number of more than 64 bits")
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in TUPLES:
            stack.append(tuple(self._pop(TUPLES[name])))
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET"):
            stack.append({} if name == "EMPTY_DICT" else [])  # a set is kept as a list
        elif name == "MARK":
            self._below.append(stack)
            self._stack = []
        elif name in ("TUPLE", "LIST", "FROZENSET", "DICT"):
            items = self._pop_to_mark()
            self._stack.append(tuple(items) if name == "TUPLE" else items if name != "DICT" else {})
            if name == "DICT":
                self._set_items(self._stack[-1], items)
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = self._pop(1) if name == "APPEND" else self._pop_to_mark()
            if isinstance(self._stack[-1], list):
                self._stack[-1].extend(items)
            elif not isinstance(self._stack[-1], Inert):
                raise ValueError("items are appended to something that is no list")
        elif name in ("SETITEM", "SETITEMS"):
            items = self._pop(2) if name == "SETITEM" else self._pop_to_mark()
            self._set_items(self._stack[-1], items)
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._pop_to_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "GLOBAL":
            stack.append(self._named(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(self._named(*self._pop(2)))
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            called, *arguments = self._pop(3 if name == "NEWOBJ_EX" else 2)
            stack.append(self._call(called, *arguments))
        elif name == "BUILD":
            (state,) = self._pop(1)
            if isinstance(stack[-1], DtypeData | ArrayData):
                stack[-1].set_state(state)
            elif not isinstance(stack[-1], Inert | dict):  # an OrderedDict's attributes are nothing to us
                raise ValueError("state is set on something that has none")
        elif name == "BINPERSID" and self.persistent is not None:
            stack.append(self.persistent(stack.pop()))
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"the instruction {name}, which no file of weights has")

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise IndexError
        items = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return items

    def _pop_to_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _set_items(self, place: object, items: list[Any]) -> None:
        if isinstance(place, Inert):
            return
        if not isinstance(place, dict) or len(items) % 2:
            raise ValueError("items are set on something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int | Named | Inert | None):  # hashing a deep tuple would end the process
                raise ValueError("a dict with a key that is neither text nor a number")
            place[key] = value

    def _named(self, module: object, name: object) -> Named:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is no text")
        whole = f"{module}.{name}"
        known = whole in FUNCTIONS or whole in self.functions or whole in ARGUMENTS
        if not known and module.split(".")[0] not in self.inert:
            raise ValueError(f"it asks for {whole[:200]!r}, which weights do not need and which is not loaded")
        return Named(whole)

    def _call(self, called: object, arguments: object, keywords: object = None) -> object:
        if not isinstance(called, Named) or not isinstance(arguments, tuple):
            raise ValueError("a call of something that is no function")
        function = self.functions.get(called.name) or FUNCTIONS.get(called.name)
        if function is None:
            return Inert()
        if called.name == "_codecs.encode" and arguments and isinstance(arguments[0], str):
            self._encoded -= len(arguments[0])
            if self._encoded < 0:
                raise ValueError("more bytes are made of text than the file has")
        try:
            return function(*arguments)
        except TypeError as error:
            raise ValueError(f"a call of {called.name} with arguments that do not fit") from error
