"""The ids of a text, and the character that each begins at.

text      I   ' v e   b e e n   東
ids       [I] [']  [ve] [ been] [ ] [E6] [9D] [B1]
starts    0   1    2    4       9   10   10   10        bytes of one character begin with it

Where the pieces spell the text, byte by byte, their lengths tell; a tokenizer that changes its text (another case or
width) is asked for its offsets, which takes ten times the memory.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import sentencepiece
from jaxtyping import Int32, Int64

from lwm_data.format.vocab import TextTokenizer

BLANK = "\u2581"  # in pieces
BLOCK = 1 << 16  # tokens


def encode_with_starts(text: str, tokenizer: TextTokenizer) -> tuple[Int32[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """The ids of `text` as tokenizer.encode has them, and where each begins, in characters; never decreasing."""
    ids = tokenizer.encode(text)
    pieces = _pieces(tokenizer.model_bytes)
    blocks = (ids[at : at + BLOCK].tolist() for at in range(0, len(ids), BLOCK))
    spelled = b"".join(b"".join(pieces[token] for token in block) for block in blocks)
    raw = text.encode()
    for prefix in (b" ", b""):  # most tokenizers put a blank before the text
        if spelled == prefix + raw:
            lengths = np.fromiter(map(len, pieces), np.int32, len(pieces))[ids]
            starts = np.cumsum(lengths, dtype=np.int32) - lengths
            opens = (np.frombuffer(spelled, np.uint8) & 0xC0) != 0x80  # bytes that begin a character
            return ids, np.maximum(np.cumsum(opens, dtype=np.int32)[starts].astype(np.int64) - 1 - len(prefix), 0)
    found = _processor(tokenizer.model_bytes).encode(text, return_type="offset_mapping")["offsets"]
    return ids, np.maximum.accumulate(np.fromiter((begin for begin, _ in found), np.int64, len(found)))


def floor_token(starts: Int64[np.ndarray, " n"], char: int) -> int:
    """The token that begins at character `char`, or else the one that it lies in."""
    token = int(np.searchsorted(starts, char))
    return token if token == len(starts) or starts[token] == char else max(0, token - 1)


@lru_cache(maxsize=1)
def _processor(model_bytes: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model_bytes)


@lru_cache(maxsize=1)
def _pieces(model_bytes: bytes) -> list[bytes]:
    """What each id spells; nothing for one that spells no text."""
    processor = _processor(model_bytes)
    pieces = []
    for token in range(processor.vocab_size()):
        piece = processor.id_to_piece(token)
        if processor.is_byte(token):
            pieces.append(bytes([int(piece[3:5], 16)]))  # <0xE6>
        elif processor.is_control(token) or processor.is_unknown(token):
            pieces.append(b"")
        else:
            pieces.append(piece.replace(BLANK, " ").encode())
    return pieces
