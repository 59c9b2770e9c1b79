"""One run: books -> chunks -> answers in the journal -> pairs.

books     chunk 0   chunk 1   chunk 2   ...     in order; a chunk whose answer is in the journal is passed over
workers   [ask]     [ask]     ...               `concurrency` of them, each takes the next chunk
journal   1  0  2                               as answers come
qa.jsonl  0.0  1.0  1.1  2.0                    at the end, by book, chunk and pair: a function of journal and manifest
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lwm_data.format.vocab import load_text_tokenizer
from lwm_data.manifest_qa import read_prompt, read_qa_manifest
from lwm_data.qa.books import CUTS, Book, read_books
from lwm_data.qa.chunks import Chunk, Chunker
from lwm_data.qa.endpoint import EndpointClient, Failed, OutOfBudget
from lwm_data.qa.in_process import InProcessClient, model_name
from lwm_data.qa.journal import JOURNAL, Journal
from lwm_data.qa.pairs import REJECTED, Run, checked_pairs, chunk_key, missing_verdicts, verdict_key, write_pairs
from lwm_data.qa.prompts import judge_messages, pair_messages
from lwm_data.qa.spending import Spending
from lwm_data.qa.summary import Summary
from lwm_data.terminal import Progress, RunFailed
from lwm_data.whole_file import remove_leftovers

LOCK = ".lock"
CHECK_ALL, CHECK_EACH = 200, 8  # answers whose pairs the progress line counts: the first so many, then every so many-th
MAX_FAILED = 8  # chunks in a row without any answer: then it is the server's fault


@dataclass(frozen=True)
class _Work:
    book: Book
    chunk: Chunk
    key: str


def generate(path: str | Path, overrides: Sequence[str] = (), retry_failed: bool = False) -> Summary:
    """Ask for what is missing, and write the pairs of all that is there.

    retry_failed: ask about chunks again of which an earlier run got no answer. KeyboardInterrupt and RunFailed come
    after what was answered is written.
    """
    manifest = read_qa_manifest(path, overrides)
    prompt = read_prompt(manifest.prompt)
    tokenizer = load_text_tokenizer(manifest.text_tokenizer)
    if manifest.in_process is not None:
        model = model_name(manifest.in_process)
    else:
        assert manifest.endpoint is not None
        model = manifest.endpoint.model
    out = Path(manifest.out)
    with _locked(out):
        for folder in (out, out / CUTS):
            remove_leftovers(folder)
        books, bad_books = read_books(manifest, tokenizer, prompt.languages)
        journal = Journal(out / JOURNAL)
        run = Run(manifest, prompt, model, tokenizer.fingerprint, journal)
        guess = (1.3 * manifest.chunk_tokens, float(manifest.parameters.max_tokens or 512))
        asking = _Asking(run, Spending(manifest.budget, manifest.price, guess), Chunker(tokenizer, 1), retry_failed)
        num_todo = sum(1 for _ in asking.todo(books))
        try:
            asyncio.run(asking.ask_all(books, num_todo))
        finally:
            if len(journal) or not num_todo or asking.out_of_budget:
                counts = write_pairs(run, books, bad_books)
        if asking.num_refused >= MAX_FAILED and not asking.num_answers:
            raise RunFailed(
                f"the server refused all {asking.num_refused:,} chunks that it was asked about; {out / REJECTED} tells "
                "why. Mend `parameters` or the prompt, then run again; as they are, with --retry-failed"
            )
        return Summary(manifest, counts, asking.spending, asking.seconds, asking.out_of_budget)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """The folder `out`, ours alone. ValueError where another run holds it, or something else lies in it."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: got {out}: a file; wanted a folder, new, empty or of an earlier run")
    if out.is_dir() and any(out.iterdir()) and not (out / LOCK).is_file():
        raise ValueError(f"out: got {out}: not empty and not of an earlier run; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"out: got {out}: another run is writing there; wait for it or stop it") from None
        yield
    finally:
        os.close(lock)


@dataclass
class _Asking:
    """What is asked in one run. num_...: answers, those whose pairs were looked at, and these pairs, for progress."""

    run: Run
    spending: Spending
    chunker: Chunker
    retry_failed: bool
    out_of_budget: bool = False
    seconds: float = 0.0
    num_answers: int = 0
    num_checked: int = 0
    num_pairs: int = 0
    num_rejected: int = 0
    num_refused: int = 0
    in_work: set[str] = field(default_factory=set)
    held: list[dict[str, Any]] = field(default_factory=list)  # failures, until the server is known to answer others

    def todo(self, books: Sequence[Book]) -> Iterator[_Work]:
        """The chunks that are not finished. Of two alike the second is not asked while the first is."""
        for book in books:
            for chunk in book.chunks():
                if not any(character.isalnum() for character in chunk.text):
                    continue
                key = chunk_key(self.run, book, chunk)
                if key not in self.in_work and not self._is_finished(key, book, chunk):
                    yield _Work(book, chunk, key)

    async def ask_all(self, books: Sequence[Book], num_todo: int) -> None:
        """Ask about all chunks that are not finished, until the budget is spent."""
        journal = self.run.journal
        try:
            if num_todo:
                with Progress("ask", num_todo, "chunks") as progress:
                    async with self._client(progress) as client:
                        await self._ask_all(client, self.todo(books), progress)
        finally:
            await journal.close()

    def _client(self, progress: Progress) -> EndpointClient | InProcessClient:
        manifest = self.run.manifest
        if manifest.in_process is not None:
            return InProcessClient(manifest.in_process, self.spending)
        assert manifest.endpoint is not None

        def tell(seconds: float) -> None:
            progress.advance(0, f"waiting {seconds:,.0f} s, the server asks for it")

        return EndpointClient(manifest.endpoint, self.spending, self.chunker.count, tell)

    async def _ask_all(
        self, client: EndpointClient | InProcessClient, todo: Iterator[_Work], progress: Progress
    ) -> None:
        endpoint = self.run.manifest.endpoint
        begin = time.monotonic()
        workers = [
            asyncio.create_task(self._work(client, todo, progress))
            for _ in range(endpoint.concurrency if endpoint else 1)
        ]
        try:
            done, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
            for worker in done:
                worker.result()
        finally:
            self.seconds = time.monotonic() - begin
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        await self._settle_failures()

    async def _work(self, client: EndpointClient | InProcessClient, todo: Iterator[_Work], progress: Progress) -> None:
        for work in todo:
            self.in_work.add(work.key)
            try:
                await self._finish(client, work)
            except OutOfBudget:
                self.out_of_budget = True
                return
            finally:
                self.in_work.discard(work.key)
            progress.advance(1, self._note())

    async def _finish(self, client: EndpointClient | InProcessClient, work: _Work) -> None:
        """Ask about one chunk, and have its pairs judged where the manifest wants that."""
        run, manifest = self.run, self.run.manifest
        if work.key not in run.journal or (self.retry_failed and run.journal.has_failed(work.key)):
            texts = run.prompt.languages[work.book.language]
            messages = pair_messages(texts, work.chunk, manifest.pairs_per_chunk)
            entry = await self._ask(client, messages, work.key, "answer", work)
        else:
            found = run.journal.get(work.key)
            assert found is not None
            entry = found
        if entry["kind"] == "failed":
            return
        self.num_answers += 1
        # All gates are passed at the end, from the journal; a third of a chunk's time here would go to them.
        if not manifest.gates.judge and self.num_answers > CHECK_ALL and self.num_answers % CHECK_EACH:
            return
        self.num_checked += 1
        for pair, problem in checked_pairs(run, work.book, work.chunk, entry["raw"]):
            self.num_pairs += 1
            self.num_rejected += problem is not None
            if problem or not manifest.gates.judge:
                continue
            key = verdict_key(run, work.book, work.key, pair)
            if key not in run.journal or (self.retry_failed and run.journal.has_failed(key)):
                messages = judge_messages(run.prompt.languages[work.book.language], work.chunk, pair)
                await self._ask(client, messages, key, "judge", work)

    async def _ask(
        self, client: EndpointClient | InProcessClient, messages: list[dict[str, str]], key: str, kind: str, work: _Work
    ) -> dict[str, Any]:
        """The entry of what the model said, which goes to the journal."""
        run = self.run
        answer = await client.ask(messages, run.manifest.parameters, wants_pairs=kind == "answer")
        entry: dict[str, Any] = {
            "key": key,
            "kind": kind,
            "book": work.book.file.key,
            "chunk": work.chunk.number,
            "chunk_sha256": work.chunk.sha256,
            "model": run.model,
            "prompt": run.prompt.name,
            "prompt_version": run.prompt.version,
            "language": work.book.language,
            "parameters": run.parameters,
            "time": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            "attempts": answer.attempts,
            "raw": answer.raw if isinstance(answer, Failed) else answer.text,
        }
        if isinstance(answer, Failed):
            entry |= {"kind": "failed", "reason": answer.reason, "detail": answer.detail}
            if answer.reason == "refused":  # a server that refuses this chunk is there for others
                await run.journal.add(entry)
                self.num_refused += 1
                return entry
            self.held.append(entry)
            if len(self.held) >= MAX_FAILED:
                raise RunFailed(
                    f"{len(self.held)} chunks in a row got no answer; the last, {work.book.file.key} chunk "
                    f"{work.chunk.number}: {answer.reason}: {answer.detail}. Look at the server, then run again: "
                    "what was answered is kept, and these are asked again"
                )
            return entry
        entry |= {"finish_reason": answer.finish_reason, "usage": answer.usage, "structured": answer.structured}
        await self._settle_failures()
        await run.journal.add(entry)
        return entry

    async def _settle_failures(self) -> None:
        """The server answers others: what failed is these chunks' own fault, and noted."""
        held, self.held = self.held, []
        for entry in held:
            await self.run.journal.add(entry)

    def _is_finished(self, key: str, book: Book, chunk: Chunk) -> bool:
        journal = self.run.journal
        if key not in journal:
            return False
        if journal.has_failed(key):
            return not self.retry_failed
        return not (self.run.manifest.gates.judge and missing_verdicts(self.run, book, chunk, key, self.retry_failed))

    def _note(self) -> str:
        spent = self.spending
        scale = self.num_answers / max(self.num_checked, 1)
        about = "about " if scale > 1 else ""
        parts = [f"{about}{round((self.num_pairs - self.num_rejected) * scale):,} pairs"]
        parts.append(f"{about}{round(self.num_rejected * scale):,} rejected")
        parts.append(f"{spent.input_tokens + spent.output_tokens:,} tokens")
        if spent.price is not None:
            parts.append(f"cost {spent.cost:.4f}")
        if self.spending.retries:
            parts.append(f"{spent.retries.total():,} repeated")
        return ", ".join(parts)
