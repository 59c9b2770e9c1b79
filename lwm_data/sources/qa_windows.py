"""Which stretch of a book is read before which of its questions: from lengths alone.

tokens    0    1000    2000    3000    4000    5000    6000
borders   |      |       |       |       |       |       |       where a context may begin and end
pairs        a       bb     c                        d           each about a stretch of tokens, its evidence
window           [------- context ------) a? no: its evidence is not in it
                                         b c                     asked at the end, or (interleaved) after a border

A window is filled to `tokens`, its questions and answers included: each question that is taken drops what does not
fit from the context's end, and is taken only where no evidence is lost and the trained share stays allowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from jaxtyping import Int64

from lwm_data.manifest_sources import Qa

BINS = 10  # of depth, that `depth: uniform` fills alike
SLACK = 4  # pairs of a bin beyond the least, or a tenth of its share, which it may have for the sake of fewer windows
TRIES = 8  # windows that are drawn, of which the one with the most questions is taken
TOO_LONG = "filtered: too long"
TOO_MUCH_TRAINED = "filtered: max_trained"
TOO_FEW = "filtered: too few questions"


@dataclass(frozen=True)
class Evidence:
    """Of a pair: its evidence is tokens[start:stop]; asked and answered it takes num_tokens, num_trained of them."""

    start: int
    stop: int
    num_tokens: int
    num_trained: int


@dataclass(frozen=True)
class Window:
    """The context tokens[start:stop]; asked: (number of the pair, token before which it is asked), in turn."""

    start: int
    stop: int
    asked: tuple[tuple[int, int], ...]


def plan_windows(
    borders: Int64[np.ndarray, " n"], pairs: Sequence[Evidence], rule: Qa, frame: int, rng: Random
) -> tuple[list[Window], dict[int, str]]:
    """Windows that ask each pair once, and the reason of each pair that none can ask.

    borders: sorted, from 0 to the end; every evidence begins at one. frame: tokens of an example besides its context
    and its pairs.
    """
    return _Planner(borders, pairs, rule, frame, rng).plan()


def depth_of(window: Window, evidence: Evidence, asked_before: int) -> float:
    """Where in the context that is read before its question the middle of the evidence is: 0 to 1."""
    return ((evidence.start + evidence.stop) / 2 - window.start) / (asked_before - window.start)


class _Planner:
    def __init__(
        self, borders: Int64[np.ndarray, " n"], pairs: Sequence[Evidence], rule: Qa, frame: int, rng: Random
    ) -> None:
        self._borders, self._pairs, self._rule, self._frame, self._rng = borders, pairs, rule, frame, rng
        self._starts = np.array([pair.start for pair in pairs], np.int64)
        self._stops = np.array([pair.stop for pair in pairs], np.int64)
        self._is_free = np.ones(len(pairs), bool)
        self._filled = [0] * BINS
        self._windows: list[Window] = []
        self._left: dict[int, str] = {}

    def plan(self) -> tuple[list[Window], dict[int, str]]:
        if self._rule.depth == "as-is":
            self._tile()
        while self._is_free.any():
            self._place_one()
        return self._windows, self._left

    def _tile(self) -> None:
        """Windows one after another over the whole book."""
        at = 0
        while at < len(self._borders) - 1:
            room = self._room()
            within = self._within(at, room)
            self._rng.shuffle(within)
            window = self._window(at, room, within)
            if window is not None:
                self._take(window)
                at = int(np.searchsorted(self._borders, window.stop))
            else:
                at = max(at + 1, int(np.searchsorted(self._borders, self._borders[at] + room, "right")) - 1)

    def _place_one(self) -> None:
        """One more window, around a pair that is not asked yet, or else one pair less."""
        best: Window | None = None
        for left in reversed(range(TRIES)):
            room = self._room()
            first, depth = self._drawn(room)
            found = self._around(first, depth, room)
            if found in (TOO_LONG, TOO_MUCH_TRAINED):
                found = self._around(first, depth, self._rule.tokens.max - self._frame)
            if isinstance(found, Window):
                best = found if best is None or len(found.asked) > len(best.asked) else best
            elif found != TOO_FEW or (best is None and not left):
                self._leave(first, found)
                return
        assert best is not None
        self._take(best)

    def _around(self, first: int, depth: float, room: int) -> Window | str:
        """The window in which the pair `first` is at about this depth, or why it cannot be asked there."""
        pair = self._pairs[first]
        context = room - pair.num_tokens
        end = int(self._borders[np.searchsorted(self._borders, pair.stop)])
        earliest = int(np.searchsorted(self._borders, max(0, end - context)))
        latest = int(np.searchsorted(self._borders, pair.start, "right")) - 1
        if earliest > latest:
            return TOO_LONG
        wanted = min((pair.start + pair.stop) / 2 - depth * context, int(self._borders[-1]) - context)
        nearest = int(np.searchsorted(self._borders, wanted, "right")) - 1
        for at in (min(max(nearest, earliest), latest), *range(earliest, latest + 1)):
            if self._window(at, room, [first], 1) is not None:
                return self._window(at, room, [first, *self._beside(first, at, room)]) or TOO_FEW
        return TOO_MUCH_TRAINED

    def _drawn(self, room: int) -> tuple[int, float]:
        """A pair, and how deep its evidence shall be: under `uniform` where least is, of what can be had."""
        free = np.flatnonzero(self._is_free)
        if self._is_balanced(room):
            middles = (self._starts[free] + self._stops[free]) / 2
            spare = int(self._borders[-1]) - room
            for number in sorted(range(BINS), key=lambda number: (self._filled[number], self._rng.random())):
                depth = (number + self._rng.random()) / BINS
                begins = middles - depth * room
                possible = free[(begins >= 0) & (begins <= spare)]
                if len(possible):
                    return int(possible[self._rng.randrange(len(possible))]), depth
        return int(free[self._rng.randrange(len(free))]), self._rng.random()

    def _beside(self, first: int, at: int, room: int) -> list[int]:
        """The other pairs that may be asked in the window from border `at` on, the most welcome first."""
        within = [number for number in self._within(at, room) if number != first]
        self._rng.shuffle(within)
        if not self._is_balanced(room):
            return within
        begin = int(self._borders[at])

        def bin_of(number: int) -> int:
            return int(((self._starts[number] + self._stops[number]) / 2 - begin) / room * BINS)

        level = self._filled[bin_of(first)] + max(SLACK, len(self._pairs) // (10 * BINS))
        filled = list(self._filled)
        filled[bin_of(first)] += 1
        welcome: list[tuple[int, int, int]] = []
        for number in within:
            of = bin_of(number)
            filled[of] += 1
            if filled[of] <= level:
                welcome.append((filled[of], len(welcome), number))
        return [number for _, _, number in sorted(welcome)]

    def _is_balanced(self, room: int) -> bool:
        """Whether depths can be chosen: not in a book that is read whole."""
        return self._rule.depth == "uniform" and int(self._borders[-1]) > room

    def _room(self) -> int:
        """Tokens of the next example, for context and pairs."""
        return self._rng.randint(self._rule.tokens.min, self._rule.tokens.max) - self._frame

    def _within(self, at: int, room: int) -> list[int]:
        begin = self._borders[at]
        inside = self._is_free & (self._starts >= begin) & (self._stops <= begin + room)
        return [int(number) for number in np.flatnonzero(inside)]

    def _window(self, at: int, room: int, numbers: Iterable[int], least: int | None = None) -> Window | None:
        """The window from border `at` on, with as many of the pairs `numbers` as may be, the first ones first."""
        questions = self._rule.questions
        most = self._rng.randint(questions.min, questions.max) if questions else None
        begin = int(self._borders[at])
        taken: list[int] = []
        num_tokens = num_trained = needed = 0
        stop = begin
        for number in numbers:
            if len(taken) == most:
                break
            pair = self._pairs[number]
            total = num_tokens + pair.num_tokens
            place = int(np.searchsorted(self._borders, begin + room - total, "right")) - 1
            end = int(self._borders[max(place, 0)])
            trained = num_trained + pair.num_trained
            size = self._frame + end - begin + total
            if end >= max(needed, pair.stop) and trained <= self._rule.max_trained * size:
                taken.append(number)
                num_tokens, num_trained, needed, stop = total, trained, max(needed, pair.stop), end
        least = (questions.min if questions else 1) if least is None else least
        return Window(begin, stop, self._ordered(taken, stop)) if len(taken) >= least else None

    def _ordered(self, taken: list[int], stop: int) -> tuple[tuple[int, int], ...]:
        """Each pair with the token before which it is asked, in turn."""
        order = self._rng.sample(taken, len(taken))
        if self._rule.order == "reading":
            order.sort(key=lambda number: (self._pairs[number].start, self._pairs[number].stop, number))
        if self._rule.order != "interleaved":
            return tuple((number, stop) for number in order)
        possible = self._undivided(taken, stop)
        places = [stop]  # the first of those drawn is asked at the end, so that all of the context is for a question
        for number in order[1:]:
            soonest = int(np.searchsorted(possible, self._pairs[number].stop))
            chosen = soonest if self._rng.random() < 0.5 else self._rng.randint(soonest, len(possible) - 1)
            places.append(int(possible[chosen]))
        return tuple(sorted(zip(order, places, strict=True), key=lambda asked: asked[1]))

    def _undivided(self, taken: list[int], stop: int) -> Int64[np.ndarray, " m"]:
        """The borders up to `stop` that lie within the evidence of none of the pairs `taken`."""
        borders = self._borders[: np.searchsorted(self._borders, stop, "right")]
        begun = np.searchsorted(np.sort(self._starts[taken]), borders)
        ended = np.searchsorted(np.sort(self._stops[taken]), borders, "right")
        return borders[begun <= ended]

    def _take(self, window: Window) -> None:
        self._windows.append(window)
        for number, place in window.asked:
            self._is_free[number] = False
            depth = depth_of(window, self._pairs[number], place)
            self._filled[min(int(depth * BINS), BINS - 1)] += 1

    def _leave(self, number: int, reason: str) -> None:
        self._is_free[number] = False
        self._left[number] = reason
