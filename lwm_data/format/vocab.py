"""Token ids: text by SentencePiece, vision by VQGAN codes; a token is (id, is_vision).

    <vision>  c0 ... c255 EOF  c0 ... c255 EOF  ...  c0 ... c255 EOV  </vision>
    text      vision                                                  text

The two id spaces are apart, as in the LWM release (arXiv 2402.08268 and its `lwm/data.py`): the model
has one embedding table and one head for each. The delimiters are plain text, so that a LLaMA vocabulary
needs no new row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import sentencepiece
from jaxtyping import Int32
from pydantic import Field

from lwm_data.format.atomic import write_whole
from lwm_data.format.manifest import ManifestModel, ManifestPath, quoted, read_manifest

if TYPE_CHECKING:
    from lwm_data.format.word_ids import WordIds

CODES_PER_FRAME = 256  # 16 x 16 patches of a 256 x 256 frame
EOF = 8192  # ends a frame that another follows
EOV = 8193  # ends the last frame
VISION_VOCAB_SIZE = 8448  # rows of the release's vision table: 8192 codes, EOF, EOV, the rest unused

SHORT_TEXT = 1 << 10  # characters, below which a table of words gains nothing

VISION_START = "<vision>"
VISION_END = "</vision>"


class TextTokenizerSpec(ManifestModel):
    """`tokenizers/*.yaml`: which SentencePiece model, and what it must be."""

    kind: Literal["text_tokenizer"]
    name: str
    model: ManifestPath = Field(description="the SentencePiece .model file")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of the model file")
    bos: int = Field(ge=0, description="id that starts every example")
    eos: int = Field(ge=0, description="id that ends every example")


@dataclass(frozen=True)
class TextTokenizer:
    """A SentencePiece model with its special ids. `model_bytes` is kept so that a dataset can carry it along."""

    name: str
    model_bytes: bytes
    bos: int
    eos: int

    @cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes)

    @cached_property
    def vocab_size(self) -> int:
        return int(self._processor.vocab_size())

    @cached_property
    def fingerprint(self) -> str:
        """Equal for two tokenizers exactly when they give the same ids: sha256 of model and special ids."""
        return hashlib.sha256(self.model_bytes + f"|{self.bos}|{self.eos}".encode()).hexdigest()

    @cached_property
    def vision_start(self) -> Int32[np.ndarray, " n"]:
        return self.encode(VISION_START)

    @cached_property
    def vision_end(self) -> Int32[np.ndarray, " n"]:
        return self.encode(VISION_END)

    @cached_property
    def _word_ids(self) -> WordIds | None:
        from lwm_data.format.word_ids import load_word_ids  # brings PyArrow, which training does without

        return load_word_ids(self.model_bytes)

    def __reduce__(self) -> tuple[type[TextTokenizer], tuple[str, bytes, int, int]]:
        return TextTokenizer, (self.name, self.model_bytes, self.bos, self.eos)  # a worker fills its own table of words

    def encode(self, text: str) -> Int32[np.ndarray, " n"]:
        """Ids of `text`, without BOS or EOS: SentencePiece's own, bit for bit.

        Needs at most 8 times the text's bytes where word_ids.py can cut it, else 60 times.
        """
        if len(text) < SHORT_TEXT or self._word_ids is None:
            return np.asarray(self._processor.encode(text), dtype=np.int32)
        found = bytearray()  # grows in place, where joining arrays would hold all ids twice
        for ids in self._word_ids.encode([text]):
            found += ids.tobytes()
        return np.frombuffer(found, np.int32)

    def encode_parts(self, parts: Iterable[str]) -> Iterator[Int32[np.ndarray, " n"]]:
        """Ids of the text whose parts are `parts`, as `encode` has them, some at a time: for texts beyond memory.

        A part may end anywhere. Where word_ids.py cannot cut the model, the whole text is held.
        """
        if self._word_ids is None:
            yield self.encode("".join(parts))
        else:
            yield from self._word_ids.encode(parts)

    def decode(self, ids: Int32[np.ndarray, " n"]) -> str:
        """Text of `ids`; ids outside the vocabulary raise ValueError."""
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size):
            raise ValueError(
                f"ids from {ids.min()} to {ids.max()}; tokenizer {self.name} has 0 to {self.vocab_size - 1}"
            )
        return str(self._processor.decode([int(i) for i in ids]))

    def pieces(self, ids: Int32[np.ndarray, " n"]) -> list[str]:
        """The piece of each id, as a person reads it (a blank where SentencePiece has its underline)."""
        return [self._processor.id_to_piece(int(i)).replace("\u2581", " ") for i in ids]

    def save(self, folder: Path) -> None:
        """Write `text_tokenizer.model` and its spec `text_tokenizer.yaml` to `folder`, each whole or not at all."""
        write_whole(folder / "text_tokenizer.model", self.model_bytes)
        spec = (
            f"kind: text_tokenizer\nname: {quoted(self.name)}\nmodel: text_tokenizer.model\n"
            f"sha256: {hashlib.sha256(self.model_bytes).hexdigest()}\nbos: {self.bos}\neos: {self.eos}\n"
        )
        write_whole(folder / "text_tokenizer.yaml", spec)


def load_text_tokenizer(spec: str | Path) -> TextTokenizer:
    """The tokenizer that the YAML file `spec` names. ValueError where the model file is not the one promised."""
    wanted = read_manifest(spec, {"text_tokenizer": TextTokenizerSpec})
    assert isinstance(wanted, TextTokenizerSpec)
    model = Path(wanted.model)
    if not model.is_file():
        raise ValueError(f"{spec}: model: no such file: {model}")
    model_bytes = model.read_bytes()
    got = hashlib.sha256(model_bytes).hexdigest()
    if got != wanted.sha256:
        raise ValueError(
            f"{spec}: sha256: {model.name} has {got}, the spec wants {wanted.sha256}; restore the model file, or "
            "correct the spec and rebuild every dataset made with it"
        )
    tokenizer = TextTokenizer(wanted.name, model_bytes, wanted.bos, wanted.eos)
    try:
        vocab_size = tokenizer.vocab_size
    except Exception as error:  # sentencepiece raises RuntimeError or OSError, by version
        raise ValueError(f"{spec}: model: {model.name} is not a SentencePiece model: {error}") from error
    for key, value in (("bos", wanted.bos), ("eos", wanted.eos)):
        if value >= vocab_size:
            raise ValueError(f"{spec}: {key}: got {value}; {model.name} has ids 0 to {vocab_size - 1}")
    return tokenizer
