"""What a run has spent: requests, tokens, cost; and whether its budget allows another request."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from lwm_data.manifest_qa import Budget, Price


@dataclass
class Spending:
    """Of one run of the command. retries: reason -> how often. guess: tokens of a request, until one is answered."""

    budget: Budget
    price: Price | None
    guess: tuple[float, float]  # tokens read, tokens written
    requests: int = 0
    answers: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    in_flight: int = 0
    retries: Counter[str] = field(default_factory=Counter)

    @property
    def cost(self) -> float:
        return self._cost(self.input_tokens, self.output_tokens)

    def usual_tokens(self) -> tuple[float, float]:
        """Tokens that one request reads and writes: the mean of those answered."""
        if not self.answers:
            return self.guess
        return self.input_tokens / self.answers, self.output_tokens / self.answers

    def allows_another(self) -> bool:
        """Whether one more request stays within the budget, with all that are in flight counted as usual ones."""
        read, written = (tokens * (self.in_flight + 1) for tokens in self.usual_tokens())
        tokens = self.input_tokens + self.output_tokens + read + written
        cost = self.cost + self._cost(read, written)
        budget = self.budget
        return not (
            (budget.requests is not None and self.requests >= budget.requests)
            or (budget.tokens is not None and tokens > budget.tokens)
            or (budget.cost is not None and cost > budget.cost)
        )

    def take(self) -> None:
        """A request is sent."""
        self.requests += 1
        self.in_flight += 1

    def charge(self, read: int, written: int) -> None:
        """A request was answered."""
        self.answers += 1
        self.input_tokens += read
        self.output_tokens += written

    def _cost(self, read: float, written: float) -> float:
        return 0.0 if self.price is None else (read * self.price.input + written * self.price.output) / 1e6
