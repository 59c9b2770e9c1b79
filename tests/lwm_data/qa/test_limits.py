"""What servers say of their limits is understood, and what a run may spend is kept to."""

import random

import pytest

from lwm_data.manifest_qa import Budget, Price
from lwm_data.qa.limits import LONGEST, backoff, duration, exhausted, retry_after
from lwm_data.qa.spending import Spending

NOW = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("20", 20.0),
        ("0.5", 0.5),
        ("0", 0.0),
        ("999999999", LONGEST),
        ("Tue, 14 Nov 2023 22:13:50 GMT", 30.0),
        ("Tue, 14 Nov 2023 22:13:00 GMT", 0.0),
        ("soon", None),
        ("", None),
        ("-3", None),
        ("Tue, 14 Nov 2023 22:13:50 +99999999999999", None),
    ],
)
def test_both_forms_of_retry_after_are_understood(value: str, seconds: float | None) -> None:
    assert retry_after({"Retry-After": value}, NOW) == seconds


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("1m30.5s", 90.5), ("250ms", 0.25), ("12", 12.0), ("1h0m0s", 3600.0), ("later", None), ("3x", None), ("", None)],
)
def test_a_duration_is_understood(value: str, seconds: float | None) -> None:
    assert duration(value) == seconds


def test_requests_wait_where_none_remains_or_too_few_tokens() -> None:
    def headers(requests: str, tokens: str) -> dict[str, str]:
        return {
            "x-ratelimit-remaining-requests": requests,
            "x-ratelimit-reset-requests": "2s",
            "x-ratelimit-remaining-tokens": tokens,
            "x-ratelimit-reset-tokens": "5s",
        }

    assert exhausted(headers("0", "9000"), 1000) == 2
    assert exhausted(headers("5", "900"), 1000) == 5
    assert exhausted(headers("0", "900"), 1000) == 5
    assert exhausted(headers("5", "9000"), 1000) is None
    assert exhausted({}, 1000) is None


def test_waits_double_and_differ() -> None:
    draw = random.Random(0)
    waits = [[backoff(attempt, 60, draw) for _ in range(50)] for attempt in range(1, 12)]
    for attempt, drawn in enumerate(waits):
        most = min(0.5 * 2**attempt, 60)
        assert most / 2 <= min(drawn) < max(drawn) <= most
        assert len(set(drawn)) > 40


@pytest.mark.parametrize(
    ("budget", "answers"), [({"requests": 3}, 3), ({"tokens": 350}, 3), ({"cost": 0.00025}, 2), ({"tokens": 50}, 0)]
)
def test_a_budget_is_never_exceeded(budget: dict[str, float], answers: int) -> None:
    spending = Spending(Budget.model_validate(budget), Price(input=1.0, output=1.0), guess=(80, 20))
    while spending.allows_another():
        spending.take()
        spending.charge(80, 20)
        spending.in_flight -= 1
    assert spending.answers == answers
    assert spending.cost == pytest.approx(answers * 0.0001)


def test_what_is_in_flight_counts_against_the_budget() -> None:
    spending = Spending(Budget(tokens=350), None, guess=(80, 20))
    for _ in range(3):
        assert spending.allows_another()
        spending.take()
    assert not spending.allows_another()
