"""Trains the text tokenizer: a SentencePiece BPE model that gives back every text exactly.

As LLaMA's: no normalisation, digits one by one, bytes for what no piece covers (line ends are such bytes), and a
blank before the text, which decoding takes off again. Ids: 0 unknown, 1 BOS, 2 EOS, 3..258 bytes, then pieces.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import random
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from lwm_data.format.manifest import quoted
from lwm_data.format.prompt import CITIES, NEEDLE_DIGITS, needle, needle_answer, needle_prompt
from lwm_data.format.vocab import TextTokenizer, load_text_tokenizer
from lwm_data.sources.files import DAMAGED, InputFile, find_files, open_unpacked, read_text
from lwm_data.sources.json_lines import MAX_LINE
from lwm_data.whole_file import whole_file

MAX_SENTENCE = 4096  # bytes; the trainer leaves longer lines out, so they are cut at blanks


def train_text_tokenizer(patterns: Sequence[str], vocab_size: int, out: Path, num_needles: int = 0) -> TextTokenizer:
    """Train on the files of the globs `patterns`; write `out` (.yaml) and the model beside it (.model).

    num_needles: questions and answers of needle retrieval to learn from as well, so that a small vocabulary has
    pieces for their words (a model of 2,048 pieces spells `Amsterdam` in five otherwise).

    .jsonl files are chats, all others text. The same files give the same bytes. ValueError for a file that cannot be
    read and for a vocabulary that the text is too small for.
    """
    if out.suffix != ".yaml":
        raise ValueError(f"--out: got {out}; wanted a name that ends in .yaml (the model goes beside it)")
    files = [file for pattern in patterns for file in find_files(pattern, "FILES")]
    model = io.BytesIO()
    errors: list[BaseException] = []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_keep_error(itertools.chain(_sentences(files), _needle_lines(num_needles)), errors),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9995,
            max_sentence_length=MAX_SENTENCE + 4,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if errors:
            raise errors[0] from None
        raise ValueError(f"--vocab-size: got {vocab_size}; {str(error).strip().splitlines()[-1]}") from error
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out.with_suffix(".model")) as file:
        file.write(model.getvalue())
    command = ["lwm-data", "tokenizer", "train-text", *patterns, "--vocab-size", str(vocab_size), "--out", str(out)]
    command += ["--needles", str(num_needles)] if num_needles else []
    comment = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shlex.join(command))
    with whole_file(out) as file:
        file.write(
            f"# {comment}\n"
            f"kind: text_tokenizer\nname: {quoted(out.stem)}\nmodel: {quoted(f'{out.stem}.model')}\n"
            f"sha256: {hashlib.sha256(model.getvalue()).hexdigest()}\nbos: 1\neos: 2\n".encode()
        )
    return load_text_tokenizer(out)


def _keep_error(lines: Iterator[str], errors: list[BaseException]) -> Iterator[str]:
    """`lines`; what they raise goes to `errors` too, since the trainer makes a RuntimeError of it."""
    try:
        yield from lines
    except (Exception, KeyboardInterrupt) as error:
        errors.append(error)
        raise


def _sentences(files: Sequence[InputFile]) -> Iterator[str]:
    """Lines of all texts, none of them empty or longer than MAX_SENTENCE bytes."""
    for file in files:
        for text in _texts(file):
            for line in text.split("\n"):
                while len(line.encode()) > MAX_SENTENCE:
                    cut = line.rfind(" ", 1, MAX_SENTENCE // 4)
                    cut = cut if cut > 0 else MAX_SENTENCE // 4
                    yield line[:cut]
                    line = line[cut:]
                if line.strip():
                    yield line


def _needle_lines(count: int) -> Iterator[str]:
    rng = random.Random(0)
    for i in range(count):
        city, number = CITIES[i % len(CITIES)], rng.randrange(10 ** (NEEDLE_DIGITS - 1), 10**NEEDLE_DIGITS)
        yield needle(city, number).strip()
        yield f"{needle_prompt('', [city])} {needle_answer([(city, number)])}"


def _texts(file: InputFile) -> Iterator[str]:
    if ".jsonl" not in file.key:
        try:
            yield read_text(file.path)
        except ValueError as error:
            raise ValueError(f"{file.path}: {error.args[0]}: {error.args[1]}") from error
        return
    with open_unpacked(file.path) as lines:
        number = 1
        try:
            while line := lines.readline(MAX_LINE):
                if line.strip():
                    yield from _turns(line, f"{file.path}: line {number}")
                number += 1
        except DAMAGED as error:
            raise ValueError(f"{file.path}: line {number}: damaged: cannot be unpacked: {error}") from error


def _turns(line: bytes, where: str) -> list[str]:
    try:
        turns = [turn for turn in json.loads(line)["data"] if isinstance(turn, str)]
        for turn in turns:
            turn.encode()  # half of a surrogate pair is no text
        return turns
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{where}: not a chat: {error}") from error
