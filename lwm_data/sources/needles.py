"""Needles: made-up retrieval examples. Facts are planted in a text, and some of them asked for.

<s> You are a ... USER: ... the old sea-dog.
The special magic Lima number is: 4083112
... What is the special magic Lima number? ... ASSISTANT:  The special magic Lima number is: 4083112. </s>
|------------------------ not trained -------------------| |----------------- trained -----------------|

Each example is a function of (seed, source name, index) and of the haystack's files, so that any block of them can
be made anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np
from jaxtyping import Int32

from lwm_data.format.example import text_runs
from lwm_data.format.prompt import BORDER, CITIES, NEEDLE_DIGITS, needle, needle_answer, needle_prompt, plant
from lwm_data.format.vocab import TextTokenizer
from lwm_data.manifest_sources import Needles
from lwm_data.sources.files import InputFile, check_unchanged, read_text
from lwm_data.sources.record import Record, Rejection

VERSION = 1  # raise it when the same inputs give other tokens
BLOCK = 256  # examples that are one unit of work
CHARS_PER_TOKEN = 6  # more than any text needs; a longer stretch is read where it is not enough


def read_needles(
    source: Needles, seed: int, haystack: tuple[InputFile, ...], start: int, stop: int, tokenizer: TextTokenizer
) -> Iterator[Record | Rejection]:
    """The examples `start` to `stop` of `source`. ValueError where `tokens` leave no room for the question."""
    for index in range(start, stop):
        rng = Random(f"{seed}/{source.name}/{index}")
        target = rng.randint(source.tokens.min, source.tokens.max)
        plan = _draw(source, rng)
        answer = tokenizer.encode(needle_answer(list(plan.asked)))

        def ids_around(text: str, plan: _Plan = plan) -> Int32[np.ndarray, " n"]:
            planted = plant(text, [needle(city, number) for city, number in plan.facts], plan.depths)
            return tokenizer.encode(needle_prompt(planted, [city for city, _ in plan.asked]))

        room = target - 2 - len(answer)  # for the prompt, besides BOS and EOS
        spare = room - len(ids_around(""))
        if spare < 0:
            raise ValueError(
                f"sources: {source.name}: tokens: got {target}; {len(plan.facts)} facts, {len(plan.asked)} asked for, "
                f"take {target - spare} tokens without any text; raise tokens.min"
            )
        text = _stretch(haystack, rng, spare * CHARS_PER_TOKEN)
        context = _first_tokens(text, spare, tokenizer)
        ids = ids_around(context)
        while len(ids) > room:  # planting splits pieces, so a prompt can come out a little longer
            context = _first_tokens(context, max(0, len(tokenizer.encode(context)) - (len(ids) - room)), tokenizer)
            ids = ids_around(context)
        yield Record(f"{index:08d}", text_runs(tokenizer, [(ids, False), (answer, True)], eos=True))


@dataclass(frozen=True)
class _Plan:
    """facts: (city, number) of all that are planted, at `depths`; asked: those of them that the question is about."""

    facts: tuple[tuple[str, int], ...]
    depths: tuple[float, ...]
    asked: tuple[tuple[str, int], ...]


def _draw(source: Needles, rng: Random) -> _Plan:
    num_planted = rng.randint(source.needles.min, source.needles.max)
    num_asked = min(rng.randint(source.asked.min, source.asked.max), num_planted)
    cities = rng.sample(CITIES, num_planted)
    facts = [(city, rng.randrange(10 ** (NEEDLE_DIGITS - 1), 10**NEEDLE_DIGITS)) for city in cities]
    depths = [rng.random() for _ in facts]
    return _Plan(tuple(facts), tuple(depths), tuple(rng.sample(facts, num_asked)))


def _first_tokens(text: str, num_tokens: int, tokenizer: TextTokenizer) -> str:
    """The longest beginning of `text` that ends with a word and has at most about `num_tokens` tokens."""
    ids = tokenizer.encode(text)
    if len(ids) <= num_tokens:
        return text if num_tokens else ""
    shorter = tokenizer.decode(ids[:num_tokens])
    while shorter and not text.startswith(shorter):  # a character of several bytes was cut
        shorter = shorter[:-1]
    word_end = max(shorter.rfind(" "), shorter.rfind("\n"))
    return shorter[:word_end] if word_end > 0 else shorter


def _stretch(haystack: tuple[InputFile, ...], rng: Random, num_chars: int) -> str:
    """`num_chars` characters from a random sentence on, over into the next files where needed."""
    (number,) = rng.choices(range(len(haystack)), weights=[file.num_bytes for file in haystack])
    text = _text(haystack[number])
    at = rng.randrange(len(text))
    border = BORDER.search(text, at)
    at = border.end() if border else at
    parts = [text[at : at + num_chars]]
    while (missing := num_chars - sum(map(len, parts))) > 0:
        number = (number + 1) % len(haystack)
        parts.append(_text(haystack[number])[:missing])
    return "\n".join(parts)


@lru_cache(maxsize=4)  # texts of up to MAX_TEXT_BYTES
def _text(file: InputFile) -> str:
    try:
        text = read_text(file.path)
    except ValueError as error:
        raise ValueError(f"haystack: {file.path}: {error.args[0]}: {error.args[1]}") from error
    check_unchanged(file)
    return text
