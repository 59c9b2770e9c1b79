"""A run in one table, and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lwm_data.manifest_qa import QaManifest
from lwm_data.qa.pairs import REJECTED, Counts
from lwm_data.qa.spending import Spending


@dataclass(frozen=True)
class Summary:
    """counts: of all that is there. spending, seconds, out_of_budget: of this run."""

    manifest: QaManifest
    counts: Counts
    spending: Spending
    seconds: float
    out_of_budget: bool

    def described(self) -> dict[str, Any]:
        """For a script."""
        counts, spent = self.counts, self.spending
        names = ("books", "chunks", "wordless", "answered", "failed", "remaining", "pairs", "input_tokens")
        return {name: getattr(counts, name) for name in (*names, "output_tokens")} | {
            "out": str(Path(self.manifest.out) / self.manifest.output),
            "bad_books": dict(counts.bad_books),
            "rejected": dict(sorted(counts.rejected.items())),
            "this_run": {
                "requests": spent.requests,
                "answers": spent.answers,
                "repeated": dict(sorted(spent.retries.items())),
                "input_tokens": spent.input_tokens,
                "output_tokens": spent.output_tokens,
                "cost": spent.cost if spent.price is not None else None,
                "seconds": round(self.seconds, 3),
                "out_of_budget": self.out_of_budget,
            },
        }

    def table(self) -> Table:
        """For a person."""
        counts, spent = self.counts, self.spending
        table = Table(title=f"{counts.pairs:,} pairs of {counts.answered:,} chunks")
        table.add_column("what", overflow="fold")
        table.add_column("number", justify="right")
        for name, number in (
            ("books", counts.books),
            ("chunks", counts.chunks),
            ("  answered", counts.answered),
            ("  without an answer (asked again with --retry-failed)", counts.failed),
            ("  without a word, not asked", counts.wordless),
            ("  remaining", counts.remaining),
            ("pairs", counts.pairs),
            ("pairs rejected", counts.rejected.total()),
            *((f"  {reason}", number) for reason, number in sorted(counts.rejected.items())),
            *((f"books rejected: {reason}", number) for reason, number in sorted(counts.bad_books.items())),
            ("tokens read for these answers", counts.input_tokens),
            ("tokens written", counts.output_tokens),
            ("requests of this run", spent.requests),
            *((f"  repeated: {reason}", number) for reason, number in sorted(spent.retries.items())),
            ("tokens of this run, read and written", spent.input_tokens + spent.output_tokens),
        ):
            if number or not name.startswith(" "):
                table.add_row(name, f"{number:,}")
        if spent.price is not None:
            table.add_row("cost of this run", f"{spent.cost:,.4f}")
        return table

    def closing(self) -> str:
        """The last line: where the pairs are, and what is left to do."""
        counts, out = self.counts, Path(self.manifest.out)
        said = f"{counts.pairs:,} pairs in {out / self.manifest.output}"
        if counts.rejected or counts.bad_books or counts.failed:
            said += f"; what was not kept is in {out / REJECTED}"
        if self.out_of_budget and not self.spending.requests:
            read, written = self.spending.usual_tokens()
            said += f"\nthe budget holds no request: one may take {read + written:,.0f} tokens; raise `budget`"
        elif self.out_of_budget:
            said += f"\nthe budget is spent; {counts.remaining:,} chunks remain: run the same command to go on"
        return said
