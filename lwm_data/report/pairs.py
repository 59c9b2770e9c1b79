"""A run of question answering as a page shows it: pairs beside their evidence, and what they are like in numbers.

qa.jsonl         question, answer, book, chunk's characters       all lines are counted, some are drawn by the seed
rejected.jsonl   the same of what was not kept, with its reason   the first of each reason
books            the text around the chunk                        only of the pairs shown, one book in memory at a time

    evidence     ... context [ chunk, with the words of the answer marked ] context ...
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from lwm_data.manifest_qa import read_qa_manifest
from lwm_data.report.charts import FILL_BINS, LOG_BINS, log_bin
from lwm_data.report.evidence import ShownPair, marked
from lwm_data.report.page_text import shown
from lwm_data.sources.files import InputFile, find_files, read_text
from lwm_data.sources.json_lines import JsonLine, read_json_lines
from lwm_data.summary import visible
from lwm_data.work_folder import REJECTED

PER_REASON = 5
LISTED = 60  # rejected ones in all
BOOKS = 10_000  # counted by name
TEXT, CHUNK_TEXT, CONTEXT = 1_000, 8_000, 300  # characters
EVIDENCE = 1_000_000  # characters of a page
MEASURES = ("characters of a question", "characters of an answer", "tokens of a chunk")


@dataclass(frozen=True)
class PairFiles:
    """Where the pairs are, and by which glob the books are; None where it is not known."""

    pairs: Path
    books: str | None

    @property
    def rejected(self) -> Path:
        return self.pairs.parent / REJECTED


@dataclass(frozen=True)
class PairCounts:
    """Of all pairs. lengths: by MEASURES. depths: of the pairs of the books that were read, by place in their book."""

    num_pairs: int
    lengths: Int64[np.ndarray, "3 bins"]
    books: Counter[str]
    models: Counter[str]
    depths: Int64[np.ndarray, " bins"]
    rejected: Counter[str]


def find_pairs(target: Path, books: str | None) -> PairFiles | None:
    """The files that `target` names: a manifest, a run's folder or the pairs themselves; None where it is none."""
    if target.suffix in (".yaml", ".yml") and target.is_file():
        manifest = read_qa_manifest(target)
        return PairFiles(Path(manifest.out) / manifest.output, books or manifest.books)
    if target.is_file():
        return PairFiles(target, books)
    for name in ("qa.jsonl", "qa.jsonl.zst", "qa.parquet"):
        if (target / name).is_file():
            return PairFiles(target / name, books)
    return None


def read_pairs(files: PairFiles, most: int, seed: int) -> tuple[PairCounts, list[ShownPair], list[ShownPair]]:
    """The counts, `most` pairs or fewer drawn by the seed, and the first rejected ones of each reason.

    ValueError where the file of pairs is damaged.
    """
    random = np.random.default_rng(seed)
    drawn: list[tuple[int, dict[str, Any]]] = []
    lengths = np.zeros((len(MEASURES), LOG_BINS), np.int64)
    books: Counter[str] = Counter()
    models: Counter[str] = Counter()
    num_pairs = 0
    for pair in _pairs(files.pairs):
        tokens = pair["tokens"][1] - pair["tokens"][0] if _is_span(pair.get("tokens")) else 0
        sizes = np.array([len(pair["question"]), len(pair["answer"]), tokens])
        lengths[np.arange(len(MEASURES)), log_bin(sizes)] += sizes > 0
        for counter, name in ((books, "book"), (models, "model")):
            told = str(pair.get(name, ""))
            if len(counter) < BOOKS or told in counter:
                counter[told] += 1
        if len(drawn) < most:
            drawn.append((num_pairs, pair))
        elif (place := int(random.integers(num_pairs + 1))) < most:  # each pair has the same chance
            drawn[place] = (num_pairs, pair)
        num_pairs += 1
    drawn.sort(key=lambda found: found[0])
    rejected, reasons = _rejected(files.rejected)
    kept = [(pair, _shown(pair)) for _, pair in drawn]
    wrong = [(pair, _shown(pair)) for pair in rejected]
    spans = _add_evidence([*kept, *wrong], files.books)
    counts = PairCounts(num_pairs, lengths, books, models, _depths(files.pairs, spans), reasons)
    return counts, [pair for _, pair in kept], [pair for _, pair in wrong]


def _pairs(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(1000):
                    yield from (_checked(path, number, pair) for number, pair in enumerate(batch.to_pylist(), 1))
        except pa.ArrowException as error:
            raise ValueError(f"{path}: not a Parquet file of pairs: {error}") from error
        return
    for line in read_json_lines(InputFile(str(path), path.name)):
        if not isinstance(line, JsonLine):
            raise ValueError(f"{path}: {line.key}: {line.reason}: {line.detail}; run `lwm-data qa` again to write it")
        yield _checked(path, line.key, line.value)


def _checked(path: Path, where: object, pair: Any) -> dict[str, Any]:
    if not isinstance(pair, dict) or not all(isinstance(pair.get(name), str) for name in ("question", "answer")):
        raise ValueError(f"{path}: {where}: no pair; wanted `question` and `answer`, as `lwm-data qa` writes them")
    return pair


def _rejected(path: Path) -> tuple[list[dict[str, Any]], Counter[str]]:
    found: list[dict[str, Any]] = []
    reasons: Counter[str] = Counter()
    if path.is_file():
        for line in read_json_lines(InputFile(str(path), path.name)):
            value = line.value if isinstance(line, JsonLine) and isinstance(line.value, dict) else {}
            reason = shown(value.get("reason") or f"not a line of {REJECTED}")
            if len(reasons) >= BOOKS and reason not in reasons:
                reason = "other reasons"
            reasons[reason] += 1
            if reasons[reason] <= PER_REASON and len(found) < LISTED:
                found.append(value | {"reason": reason})
    return found, reasons


def _shown(pair: dict[str, Any]) -> ShownPair:
    chars = f", characters {pair['chars'][0]:,} to {pair['chars'][1]:,}" if _is_span(pair.get("chars")) else ""

    def text(name: str) -> str:
        return visible(str(pair.get(name) or "")[:TEXT], kept="\n\t")

    return ShownPair(
        question=text("question"),
        answer=text("answer"),
        book=shown(pair.get("book")),
        place=f"chunk {shown(pair['chunk'])}{chars}" if "chunk" in pair else "",
        raw=text("raw"),
        reason=pair.get("reason", ""),
        detail=shown(pair.get("detail"), 400),
    )


def _add_evidence(pairs: list[tuple[dict[str, Any], ShownPair]], books: str | None) -> dict[str, int]:
    """Give the pairs their chunks; the number of characters of each book that was read."""
    by_book: defaultdict[str, list[tuple[dict[str, Any], ShownPair]]] = defaultdict(list)
    for pair, of_page in pairs:
        if _is_span(pair.get("chars")):
            by_book[str(pair.get("book"))].append((pair, of_page))
    files = {file.key: file for file in find_files(books, "--books")} if books else {}
    sizes: dict[str, int] = {}
    most = min(CHUNK_TEXT, EVIDENCE // max(len(pairs), 1))
    for book, held in by_book.items():
        problem, text = "", ""
        if not books:
            problem = "name the books by --books, as the manifest does, to see it"
        elif book not in files:
            problem = f"{books} does not hold this book"
        else:
            try:
                text = read_text(files[book].path)
                sizes[book] = len(text)
            except ValueError as error:
                problem = ": ".join(map(str, error.args))
        for pair, of_page in held:
            start, stop = pair["chars"]
            chunk = text[start:stop]
            wanted = pair.get("chunk_sha256")
            if text and wanted and hashlib.sha256(chunk.encode()).hexdigest() != wanted:
                of_page.problem = "the book has changed since: its text is not the one that was asked about"
            elif not text or not chunk:
                of_page.problem = problem or "the book ends before it"
            else:
                of_page.before = visible(text[max(0, start - CONTEXT) : start], kept="\n\t")
                of_page.parts = marked(visible(chunk[:most].replace("\r\n", "\n"), kept="\n\t"), of_page.answer)
                of_page.after = visible(text[stop : stop + CONTEXT], kept="\n\t") if len(chunk) <= most else "…"
    return sizes


def _depths(path: Path, sizes: dict[str, int]) -> Int64[np.ndarray, " bins"]:
    """Where in its book the middle of each pair's chunk lies, of the books whose length is known."""
    depths = np.zeros(FILL_BINS, np.int64)
    if sizes:
        for pair in _pairs(path):
            size = sizes.get(str(pair.get("book")))
            if size and _is_span(pair.get("chars")):
                place = (pair["chars"][0] + pair["chars"][1]) / (2 * size)
                depths[min(int(place * FILL_BINS), FILL_BINS - 1)] += 1
    return depths


def _is_span(value: Any) -> bool:
    """Whether it is [start, stop]."""
    is_two = isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)
    return is_two and 0 <= value[0] <= value[1] < 1 << 40
