"""Text ids by a table of words: the ids of SentencePiece's own `encode`, at many times its speed.

    text     Call me  Ishmael.\n            a blank goes before it where the model says so (its dummy prefix)
    words   | Call| me|  Ishmael|.|\n|      cut between two bytes wherever no piece of the model has both together
    ids      3312 528 28705 2013 ...        each word once by SentencePiece, then from the table

Why that is exact for BPE: it merges neighbours whose union is a piece, best score first, leftmost first among
equals. Where no piece holds the bytes on both sides of a cut, no merge crosses it, and the merges on its left and
right do not know of each other. Unigram models are not cut: their best path sums float32 scores along the whole
text, so rounding far on the left may decide a tie.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np
import pyarrow as pa
import sentencepiece
from google.protobuf.message import DecodeError
from jaxtyping import Bool, Int32, Int64
from sentencepiece import sentencepiece_model_pb2 as model_format

BLOCK = 1 << 20  # characters that are cut and looked up at a time
TABLE_BYTES = 1 << 26  # what the table may hold; it is emptied when it holds more
ROW_BYTES = 150  # of a row beyond its word and its ids: Python's bytes, dict entry and int
BLANK = "\u2581"  # how SentencePiece writes a blank; it takes one that stands in the text for a blank, too


def load_word_ids(model_bytes: bytes) -> WordIds | None:
    """The encoder by words of a SentencePiece model; None where cutting is not proven to be exact."""
    try:
        model = model_format.ModelProto.FromString(model_bytes)
        pieces = [(piece.piece, piece.type) for piece in model.pieces]
    except (DecodeError, UnicodeDecodeError):  # SentencePiece's reader takes what Python's does not
        return None
    is_bpe = model.trainer_spec.model_type == model_format.TrainerSpec.BPE
    if not is_bpe or not model.normalizer_spec.escape_whitespaces or any(" " in piece for piece, _ in pieces):
        return None
    return WordIds(model, _cut_table(pieces, model.trainer_spec.byte_fallback))


def _cut_table(pieces: list[tuple[str, int]], byte_fallback: bool) -> Bool[np.ndarray, " 65536"]:
    """May a text be cut between two bytes? At [256 * left + right], of the text with blanks for BLANK."""
    kinds = model_format.ModelProto.SentencePiece
    text_kinds = (kinds.NORMAL, kinds.USER_DEFINED, kinds.UNUSED)  # no text gives a piece of the other kinds whole
    may_cut = np.ones((256, 256), bool)
    joined = b"\xff".join(piece.replace(BLANK, " ").encode() for piece, kind in pieces if kind in text_kinds)
    values = np.frombuffer(joined, np.uint8)  # 255 is in no text
    may_cut[values[:-1], values[1:]] = False
    may_cut[:, 0x80:0xC0] = False  # inside a character
    if not byte_fallback:
        # Unknown characters in a row become one id, so what follows a cut must be known.
        known = {piece.replace(BLANK, " ") for piece, kind in pieces if kind in (kinds.NORMAL, kinds.USER_DEFINED)}
        may_cut[:, [byte for byte in range(256) if byte >= 0x80 or chr(byte) not in known]] = False
    return may_cut.reshape(-1)


class WordIds:
    """Encodes with the BPE model `model`, cut by the table `may_cut`. Threads may share it."""

    def __init__(self, model: model_format.ModelProto, may_cut: Bool[np.ndarray, " 65536"]) -> None:
        self._may_cut = may_cut
        spec = model.normalizer_spec
        # Where the model does more to a text than to put a blank before it, its own normaliser sees all of it first.
        blank_first = not model.trainer_spec.treat_whitespace_as_suffix
        plain = blank_first and not (spec.precompiled_charsmap or spec.remove_extra_whitespaces)
        self._normalizer = None if plain else _processor(model)
        self._prefix = b" " if plain and spec.add_dummy_prefix else b""
        words = model_format.ModelProto.FromString(model.SerializeToString())
        words.DiscardUnknownFields()  # samples for a test of the model, which is another one now
        words.normalizer_spec.Clear()
        words.normalizer_spec.add_dummy_prefix = words.normalizer_spec.remove_extra_whitespaces = False
        self._processor = _processor(words)
        self._lock = threading.Lock()  # of the table
        self._row_of: dict[bytes, int] = {}
        self._table = _no_rows()
        self._num_bytes = 0

    def encode(self, parts: Iterable[str]) -> Iterator[Int32[np.ndarray, " n"]]:
        """Ids of the text whose parts are `parts`, some at a time; a part may end anywhere.

        Holds two blocks and the text's longest word; all of the text where the model normalises it.
        """
        if self._normalizer is not None:
            parts = [self._normalizer.normalize("".join(parts))]
        rest = self._prefix  # of the text, after the last cut that is known
        waiting: list[bytes] = []
        num_waiting, begun = 0, False
        for part in parts:
            for start in range(0, len(part), BLOCK):
                waiting.append(part[start : start + BLOCK].replace(BLANK, " ").encode())
                num_waiting += len(waiting[-1])
                if num_waiting < max(BLOCK, len(rest)):  # so that a long word is not read over and over
                    continue
                rest = b"".join([rest, *waiting])
                waiting, num_waiting, begun = [], 0, True
                ends = self._cuts(rest)
                if len(ends):
                    yield self._ids(rest[: ends[-1]], ends)
                    rest = rest[ends[-1] :]
        if begun or waiting:
            rest = b"".join([rest, *waiting])
            yield self._ids(rest, np.append(self._cuts(rest), len(rest)))

    def _cuts(self, text: bytes) -> Int64[np.ndarray, " n"]:
        """Where `text` may be cut; rising, neither 0 nor its length."""
        values = np.frombuffer(text, np.uint8)
        neighbours = values[:-1].astype(np.uint16)
        neighbours <<= 8
        neighbours |= values[1:]
        return np.flatnonzero(self._may_cut[neighbours]) + 1

    def _ids(self, text: bytes, ends: Int64[np.ndarray, " words"]) -> Int32[np.ndarray, " n"]:
        """Ids of `text`, whose words end at `ends`."""
        offsets = np.append(0, ends)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(text)]
        words = pa.Array.from_buffers(pa.large_binary(), len(ends), buffers).dictionary_encode()
        with self._lock:
            rows = self._rows(words.dictionary.to_pylist())[_numpy(words.indices, np.int32)]
            ids = _numpy(self._table.take(_arrow(rows)).values, np.int32)
            if self._num_bytes > TABLE_BYTES:
                self._row_of, self._table, self._num_bytes = {}, _no_rows(), 0
        return ids

    def _rows(self, words: list[bytes]) -> Int64[np.ndarray, " words"]:
        """The table's row of each of `words`, which are all different; the table learns those that it lacks."""
        row_of = self._row_of
        missing = [word for word in words if word not in row_of]
        if missing:
            ids = self._processor.encode(missing, num_threads=1)
            lengths = np.fromiter(map(len, ids), np.int64, len(ids))
            flat = np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum()))
            learnt = pa.LargeListArray.from_arrays(_arrow(np.append(0, np.cumsum(lengths))), _arrow(flat))
            first = len(self._table)
            self._table = pa.concat_arrays([self._table, learnt])
            row_of.update(zip(missing, range(first, len(self._table)), strict=True))
            self._num_bytes += sum(map(len, missing)) + 4 * len(flat) + ROW_BYTES * len(missing)
        return np.fromiter(map(row_of.__getitem__, words), np.int64, len(words))


def _no_rows() -> pa.LargeListArray:
    return pa.LargeListArray.from_arrays(_arrow(np.zeros(1, np.int64)), _arrow(np.zeros(0, np.int32)))


# Views, both ways. PyArrow's own `array` and `to_numpy` would import pandas first, which takes seconds.
def _arrow(values: np.ndarray) -> pa.Array:
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def _numpy(array: pa.Array, dtype: type) -> np.ndarray:
    return np.frombuffer(array.buffers()[1], dtype, array.offset + len(array))[array.offset :]


def _processor(model: model_format.ModelProto) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
