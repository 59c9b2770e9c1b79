"""Answers to pairs: which are kept, which are not and why. A function of the journal, the books and the manifest.

raw answer -> parse -> gates -> judge's verdict -> asked before? -> qa.jsonl
                |        |            |                |
                +--------+------------+----------------+--------> rejected.jsonl, with reason; raw answer once
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lwm_data.manifest_qa import QaManifest, QaPrompt
from lwm_data.qa.answers import Pair, parse_answer, parse_verdict
from lwm_data.qa.books import Book
from lwm_data.qa.chunks import Chunk
from lwm_data.qa.gates import normalised, pair_problem
from lwm_data.qa.journal import Journal
from lwm_data.qa.output import only_output, pair_file
from lwm_data.qa.prompts import answer_key, judge_key, prompt_fingerprint
from lwm_data.sources.record import Rejection
from lwm_data.terminal import Progress
from lwm_data.whole_file import whole_file

REJECTED = "rejected.jsonl"
NOT_JUDGED = "not judged yet"
MOST = 4  # times as many pairs as were asked for: what an answer holds beyond is not looked at


@dataclass(frozen=True)
class Run:
    """What makes an answer the answer it is, and the journal where answers are."""

    manifest: QaManifest
    prompt: QaPrompt
    model: str
    tokenizer: str  # fingerprint
    journal: Journal

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """As they stand in a pair."""
        return self.manifest.parameters.model_dump(exclude={"extra"}) | self.manifest.parameters.extra

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Of the prompt, by language."""
        return {
            language: prompt_fingerprint(self.prompt, language, self.manifest.pairs_per_chunk)
            for language in self.prompt.languages
        }


@dataclass
class Counts:
    """Of chunks: answered, failed, remaining (not asked, or answered but not judged), wordless (never asked).

    Of pairs: pairs (kept), rejected (by reason). Of the answers that count: tokens.
    """

    books: int
    bad_books: Counter[str]
    rejected: Counter[str]
    chunks: int = 0
    answered: int = 0
    failed: int = 0
    remaining: int = 0
    wordless: int = 0
    pairs: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


def chunk_key(run: Run, book: Book, chunk: Chunk) -> str:
    """The journal's key of the answer about `chunk`."""
    return answer_key(chunk, run.model, run.fingerprints[book.language], run.parameters)


def verdict_key(run: Run, book: Book, answer: str, pair: Pair) -> str:
    """The journal's key of the verdict on `pair`."""
    return judge_key(answer, run.prompt.languages[book.language], pair)


def checked_pairs(run: Run, book: Book, chunk: Chunk, raw: str) -> Iterator[tuple[Pair, tuple[str, str] | None]]:
    """The pairs of an answer, and what the gates say of each: reason and detail, or None."""
    asked = run.manifest.pairs_per_chunk
    for number, pair in enumerate(parse_answer(raw)):
        if number < MOST * asked:
            yield pair, pair_problem(pair, chunk.text, book.language, run.manifest.gates)
        else:
            yield pair, ("more pairs than asked", f"number {number + 1:,}, {asked} asked")


def missing_verdicts(run: Run, book: Book, chunk: Chunk, key: str, retry_failed: bool) -> bool:
    """Whether the judge must still be asked about a pair of the answered `chunk`."""
    entry = run.journal.get(key)
    assert entry is not None
    for pair, problem in checked_pairs(run, book, chunk, entry["raw"]):
        if problem is None:
            verdict = verdict_key(run, book, key, pair)
            if verdict not in run.journal or (retry_failed and run.journal.has_failed(verdict)):
                return True
    return False


def write_pairs(run: Run, books: Sequence[Book], bad_books: Sequence[Rejection]) -> Counts:
    """Write the file of pairs and rejected.jsonl, both whole, in the order of books, chunks and pairs."""
    counts = Counts(len(books), Counter(book.reason for book in bad_books), Counter())
    out = Path(run.manifest.out)
    with (
        only_output(out, run.manifest.output),
        whole_file(out / REJECTED) as rejected,
        pair_file(out / run.manifest.output) as write,
        Progress("write", len(books), "books") as progress,
    ):

        def reject(**said: Any) -> None:
            rejected.write(json.dumps(said, ensure_ascii=False).encode() + b"\n")

        for bad in bad_books:
            reject(book=bad.key, reason=bad.reason, detail=bad.detail)
        for book in books:
            asked: set[str] = set()
            for chunk in book.chunks():
                counts.chunks += 1
                where = {"book": book.file.key, "chunk": chunk.number, "chars": list(chunk.chars)}
                key = chunk_key(run, book, chunk)
                entry = run.journal.get(key)
                if not any(character.isalnum() for character in chunk.text):
                    counts.wordless += 1
                elif entry is None:
                    counts.remaining += 1
                elif entry["kind"] == "failed":
                    counts.failed += 1
                    reject(
                        **where, reason="no answer", detail=f"{entry['reason']}: {entry['detail']}", raw=entry["raw"]
                    )
                else:
                    counts.answered += 1
                    counts.input_tokens += entry["usage"]["prompt_tokens"]
                    counts.output_tokens += entry["usage"]["completion_tokens"]
                    is_judged, ended = True, {"finish_reason": entry["finish_reason"], "raw": entry["raw"]}
                    for number, pair, problem in _verdicts(run, book, chunk, key, entry["raw"], asked):
                        if problem is None:
                            counts.pairs += 1
                            write(_row(run, book, chunk, number, pair, entry))
                            continue
                        reason, detail = problem
                        is_judged = is_judged and reason != NOT_JUDGED
                        counts.rejected[reason] += 1
                        told = {"question": pair.question, "answer": pair.answer}
                        reject(id=_id(book, chunk, number), **where, **told, reason=reason, detail=detail, **ended)
                        ended = {}  # an answer of many pairs stands with the first of them that is not kept
                    counts.remaining += not is_judged
            progress.advance(1, f"{counts.pairs:,} pairs")
    return counts


def _verdicts(
    run: Run, book: Book, chunk: Chunk, key: str, raw: str, asked: set[str]
) -> Iterator[tuple[int, Pair, tuple[str, str] | None]]:
    """Each pair of an answer with its number and why it is not kept; one empty pair where the answer has none."""
    nothing = ("no pair in the answer", f"{len(raw):,} characters")
    pairs = [*checked_pairs(run, book, chunk, raw)] or [(Pair("", ""), nothing)]
    for number, (pair, problem) in enumerate(pairs):
        if problem is None and run.manifest.gates.judge:
            problem = _verdict(run, verdict_key(run, book, key, pair))
        question = normalised(pair.question)
        if problem is None and run.manifest.gates.unique and question in asked:
            problem = ("question asked before", "in the same book")
        if problem is None:
            asked.add(question)
        yield number, pair, problem


def _verdict(run: Run, key: str) -> tuple[str, str] | None:
    entry = run.journal.get(key)
    if entry is None:
        return NOT_JUDGED, "run again"
    if entry["kind"] == "failed":
        return "not judged", f"{entry['reason']}: {entry['detail']}"
    found = parse_verdict(entry["raw"])
    if found:
        return None
    return ("judged wrong" if found is False else "unclear verdict"), entry["raw"][:200]


def _id(book: Book, chunk: Chunk, number: int) -> str:
    return f"{book.file.key}:{chunk.number}:{number}"


def _row(run: Run, book: Book, chunk: Chunk, number: int, pair: Pair, entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": _id(book, chunk, number),
        "question": pair.question,
        "answer": pair.answer,
        "book": book.file.key,
        "book_sha256": book.file.sha256,
        "chunk": chunk.number,
        "chars": list(chunk.chars),
        "tokens": list(chunk.tokens),
        "chunk_sha256": chunk.sha256,
        "tokenizer": run.tokenizer,
        "language": book.language,
        "model": run.model,
        "prompt": run.prompt.name,
        "prompt_version": run.prompt.version,
        "parameters": run.parameters,
        "time": entry["time"],
        "usage": entry["usage"],
    }
