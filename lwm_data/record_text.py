"""The text of a record in the token store, piece by piece, so that a long book never lies in memory whole.

    tokens   BOS  403 77 2 ...  EOS  8 91 ...       a text run, then vision, then text
    bytes    " "  "It was"  ...  " "  "a cat" ...    vision is left out, BOS and EOS are blanks
    blocks   "It was the best of"  " times, it was"  NFC, each stretch of white space one blank, cut before a blank

It is the text that the tokens stand for: whatever kind of source it came from, and after what its tokenizer does to
it. `TextTokenizer.decode` gives the same for a whole record, at two thirds of the speed and with all of it in memory.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterator

import numpy as np

from lwm_data.format.vocab import TextTokenizer
from lwm_data.sources.record import Record

BLOCK_TOKENS = 1 << 16  # decoded at a time
BLOCK_CHARS = 1 << 15  # the least of a block, but for the last one
MAX_WORD = 1 << 20  # characters without a blank, after which a block is cut all the same
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def piece_bytes(tokenizer: TextTokenizer) -> list[bytes]:
    """The bytes that each id stands for; a blank for BOS and EOS, which part texts."""
    pieces = tokenizer.pieces(np.arange(tokenizer.vocab_size, dtype=np.int32))
    table = []
    for piece in pieces:
        match = BYTE_PIECE.fullmatch(piece)
        table.append(bytes([int(match[1], 16)]) if match else piece.encode())
    table[tokenizer.bos] = table[tokenizer.eos] = b" "
    return table


def text_blocks(record: Record, table: list[bytes]) -> Iterator[str]:
    """The text of `record`; joined, the blocks are the whole. table: of `piece_bytes`."""
    is_first, is_parted = True, False
    for part in _parts(record, table):
        is_parted = is_parted or part[0].isspace()
        if block := fold(part):
            yield block if is_first or not is_parted else f" {block}"
            is_first, is_parted = False, part[-1].isspace()


def fold(text: str) -> str:
    """`text` in Unicode's NFC, with one blank for each stretch of white space and none at its ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _parts(record: Record, table: list[bytes]) -> Iterator[str]:
    """The text as it is, cut after a blank, or in a word that is too long where nothing composes in NFC."""
    rest = ""
    for text in _decoded(record, table):
        rest += text
        if len(rest) < BLOCK_CHARS:
            continue
        cut = 1 + max(rest.rfind(" "), rest.rfind("\n"))
        if not cut and len(rest) <= MAX_WORD:
            continue
        cut = cut or _composed_apart(rest)
        yield rest[:cut]
        rest = rest[cut:]
    if rest:
        yield rest


def _composed_apart(text: str) -> int:
    """The last place in `text` after which no mark and no vowel or end of a Hangul syllable stands."""
    for cut in range(len(text) - 1, 0, -1):
        if not unicodedata.category(text[cut]).startswith("M") and not "\u1160" <= text[cut] <= "\u11ff":
            return cut
    return len(text)


def _decoded(record: Record, table: list[bytes]) -> Iterator[str]:
    for run in record.runs:
        if run.is_vision:
            continue
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for start in range(0, len(run.tokens), BLOCK_TOKENS):
            tokens = run.tokens[start : start + BLOCK_TOKENS].tolist()
            yield decoder.decode(b"".join(map(table.__getitem__, tokens)))
        yield decoder.decode(b"", final=True) + " "
