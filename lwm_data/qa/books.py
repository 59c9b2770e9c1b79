"""The books of a manifest with their chunks: cut once, and the cuts kept, for encoding costs more than all else here.

out/cuts/9f31....npy     int32 [2, n + 1]: where chunk 0, 1, ... n begins, in characters and in tokens; n is the end
                         named by the book's bytes, the tokenizer and chunk_tokens
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from lwm_data.format.vocab import TextTokenizer
from lwm_data.manifest_qa import QaManifest
from lwm_data.qa.chunks import Chunk, Chunker
from lwm_data.qa.languages import book_language
from lwm_data.sources.files import InputFile as File
from lwm_data.sources.files import check_unchanged, find_files, hash_file, read_text
from lwm_data.sources.record import Rejection
from lwm_data.terminal import Progress
from lwm_data.whole_file import whole_file

CUTS = "cuts"
VERSION = 1  # raise it when the same text is cut elsewhere


@dataclass(frozen=True)
class Book:
    """cuts: where each chunk begins, in characters and in tokens; the last column is the end of the book."""

    file: File
    language: str
    cuts: Int32[np.ndarray, "2 n+1"]
    max_chunks: int | None

    @property
    def num_chunks(self) -> int:
        return int(min(self.cuts.shape[1] - 1, self.max_chunks or self.cuts.shape[1]))

    def chunks(self) -> Iterator[Chunk]:
        """The chunks that are asked about. ValueError where the file is not what it was."""
        text = read_text(self.file.path)
        check_unchanged(self.file)
        chars, tokens = self.cuts.tolist()
        for i in range(self.num_chunks):
            begin, end = chars[i], chars[i + 1]
            yield Chunk(i, text[begin:end], (begin, end), (tokens[i], tokens[i + 1]))


def read_books(
    manifest: QaManifest, tokenizer: TextTokenizer, prompts: Mapping[str, object]
) -> tuple[list[Book], list[Rejection]]:
    """The books of `manifest` by name, and those that cannot be asked about. ValueError where none can."""
    books: list[Book] = []
    rejected: list[Rejection] = []
    files = find_files(manifest.books, "books")
    chunker = Chunker(tokenizer, manifest.chunk_tokens)
    folder = Path(manifest.out) / CUTS
    folder.mkdir(parents=True, exist_ok=True)
    with Progress("cut", len(files), "books") as progress:
        for named in sorted(files, key=lambda file: file.key):
            file = hash_file(None, named)
            found = _read_book(file, manifest, prompts, chunker, tokenizer.fingerprint, folder)
            if isinstance(found, Book):
                books.append(found)
            else:
                rejected.append(found)
            progress.advance(1, f"{sum(book.num_chunks for book in books):,} chunks")
    if not books:
        first = rejected[0]
        raise ValueError(
            f"books: got {manifest.books}: none of {len(files):,} can be asked about; the first, {first.key}: "
            f"{first.reason}: {first.detail}"
        )
    return books, rejected


def _read_book(
    file: File, manifest: QaManifest, prompts: Mapping[str, object], chunker: Chunker, tokenizer: str, folder: Path
) -> Book | Rejection:
    try:
        text = read_text(file.path)
    except ValueError as error:
        reason, detail = error.args
        return Rejection(file.key, reason, detail)
    language = book_language(text) if manifest.language == "auto" else manifest.language
    if language not in prompts:
        detail = f"{language}; {manifest.prompt} has {', '.join(prompts)}: add it there, or set language"
        return Rejection(file.key, "no prompt for its language", detail)
    parts = f"{VERSION} {file.sha256} {tokenizer} {manifest.chunk_tokens}"
    path = folder / f"{hashlib.sha256(parts.encode()).hexdigest()[:32]}.npy"
    cuts = _kept(path, len(text))
    if cuts is None:
        spans = [(chunk.chars, chunk.tokens) for chunk in chunker.cut(text)]
        check_unchanged(file)
        cuts = np.array([_borders([chars for chars, _ in spans]), _borders([tokens for _, tokens in spans])], np.int32)
        with whole_file(path) as out:
            np.save(out, cuts, allow_pickle=False)
    return Book(file, language, cuts, manifest.max_chunks)


def _borders(spans: Sequence[tuple[int, int]]) -> list[int]:
    return [spans[0][0], *(stop for _, stop in spans)]


def _kept(path: Path, num_chars: int) -> Int32[np.ndarray, "2 n+1"] | None:
    """The cuts that an earlier run kept, where they are whole."""
    try:
        cuts = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = cuts.ndim == 2 and cuts.shape[0] == 2 and cuts.shape[1] > 1 and cuts.dtype == np.int32
    return cuts if fits and cuts[0, 0] == 0 and cuts[0, -1] == num_chars else None
